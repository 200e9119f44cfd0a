from __future__ import annotations

import os

import pytest

from multibatch import ops
from multibatch.artifact import sha256_file
from multibatch_compile.operators import operator_library, targets


@pytest.fixture(scope="module")
def operators() -> None:
    """The compiled operators in this process, over two threads."""
    # The same tests prove the build for lesser processors, in a process of its own.
    name = os.environ.get("MULTIBATCH_TEST_OPERATORS", "native")
    library = operator_library(next(target for target in targets(portable=True) if target.name == name))
    ops.load_operators(library, sha256_file(library), ops.PROCESS_OPERATORS)
    ops.set_num_threads(2)
