from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multibatch.errors import CapacityError, ConfigError
from multibatch.kv.sizing import DeviceMemory, blocks_in_memory

GIB = 2**30


def blocks(memory: DeviceMemory, share: float = 0.9, per_block: int = 2**20, sequence: int = 32) -> int:
    return blocks_in_memory(
        memory, gpu_memory_utilization=share, bytes_per_block=per_block, blocks_per_sequence=sequence
    )


def test_the_pool_gets_what_the_share_leaves() -> None:
    # Others hold 2 GiB, weights and graphs take 20 GiB of our 72.
    memory = DeviceMemory(total=80 * GIB, free_at_start=78 * GIB, free_now=58 * GIB)
    assert blocks(memory) == 52 * 1024 - 1


def test_nothing_is_planned_with_that_is_not_free() -> None:
    # Whoever holds the 9 GiB that are gone.
    memory = DeviceMemory(total=10 * GIB, free_at_start=10 * GIB, free_now=1 * GIB)
    assert blocks(memory, share=1.0) == 1023


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan"), "0.9", True, None])
def test_a_share_outside_what_is_allowed(share: object) -> None:
    memory = DeviceMemory(total=10, free_at_start=10, free_now=10)
    with pytest.raises(ConfigError, match=re.escape(f"is {share!r}; allowed: a number above 0 and at most 1")):
        blocks(memory, share=share)  # type: ignore[arg-type]


def test_a_share_that_others_hold() -> None:
    memory = DeviceMemory(total=80 * GIB, free_at_start=61 * GIB, free_now=50 * GIB)
    message = (
        r"utilization 0\.9 asks for 72\.00 GiB of the GPU's 80\.00 GiB, but others hold 19\.00 GiB: .* at most 0\.76$"
    )
    with pytest.raises(CapacityError, match=message):
        blocks(memory)
    # What the message advises works.
    assert blocks(memory, share=0.76) > 0


@pytest.mark.parametrize("free_now", [0, 1 * GIB, int(1.1 * GIB)])
def test_too_little_for_one_sequence(free_now: int) -> None:
    memory = DeviceMemory(total=10 * GIB, free_at_start=10 * GIB, free_now=free_now)
    with pytest.raises(CapacityError, match=r"the KV pool gets 0\.\d\d GiB: .* one sequence needs 0\.32 GiB\. Raise"):
        blocks(memory, per_block=10 * 2**20)


@given(
    total=st.integers(1, 10**6),
    others=st.integers(0, 10**6),
    ours=st.integers(0, 10**6),
    share=st.floats(0.01, 1.0),
    per_block=st.integers(1, 1000),
    sequence=st.integers(1, 50),
)
def test_any_pool_is_within_the_share_and_cannot_be_larger(
    total: int, others: int, ours: int, share: float, per_block: int, sequence: int
) -> None:
    start = max(0, total - others)
    memory = DeviceMemory(total=total, free_at_start=start, free_now=max(0, start - ours))
    taken = memory.free_at_start - memory.free_now
    try:
        num_blocks = blocks(memory, share, per_block, sequence)
    except CapacityError:
        assert memory.free_at_start < int(total * share) or taken + (sequence + 1) * per_block > int(total * share)
        return
    assert num_blocks >= sequence
    assert taken + (num_blocks + 1) * per_block <= int(total * share)
    assert taken + (num_blocks + 2) * per_block > int(total * share)
