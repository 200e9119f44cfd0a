"""What a program compiled by AOTInductor does with the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable


def test_a_compiled_program_reaches_the_kernels(run_interpreted: Callable[[str], None]) -> None:
    run_interpreted("tests/cuda/interpreted_program.py")
