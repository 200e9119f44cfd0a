"""What one step computes, as the scheduler plans it and the runner reads it.

It stands below both: neither has to import the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from multibatch.request import Sequence


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens `start` up to `stop` of a sequence, computed in one prefill call."""

    sequence: Sequence
    start: int
    num_tokens: int
    # it ends at the newest token, so it gives the next one; fixed when the chunk is planned
    is_last: bool = field(init=False)

    def __post_init__(self) -> None:
        """Notes whether the chunk reaches the end of the sequence as it is now."""
        object.__setattr__(self, "is_last", self.stop == self.sequence.num_tokens)

    @property
    def stop(self) -> int:
        """The position behind the chunk's last token."""
        return self.start + self.num_tokens

    @property
    def prompt_positions(self) -> range:
        """Positions whose logits are wanted besides the last one's, for prompt_logprobs: each tells of the next token.

        None where the sequence has output: they were given before it was preempted.
        """
        sequence = self.sequence
        if sequence.request.params.prompt_logprobs is None or sequence.num_output_tokens:
            return range(0)
        return range(self.start, min(self.stop, sequence.num_prompt_tokens - 1))


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """One step: a prefill call, then a decode call. No sequence is in it twice."""

    prefill: tuple[PrefillChunk, ...] = ()
    decode: tuple[Sequence, ...] = ()
    # lost their blocks to make room for this step and wait again; not part of it
    preempted: tuple[Sequence, ...] = ()
    # all that the step computes, in row order
    sequences: tuple[Sequence, ...] = field(init=False, compare=False, repr=False)
    # those that get a token, in the order in which `update` takes the ids
    sampled: tuple[Sequence, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Lists the sequences once: a step is asked for them often."""
        object.__setattr__(self, "sequences", (*(chunk.sequence for chunk in self.prefill), *self.decode))
        last = (chunk.sequence for chunk in self.prefill if chunk.is_last)
        object.__setattr__(self, "sampled", (*last, *self.decode))

    @property
    def is_empty(self) -> bool:
        """Nothing to run."""
        return not self.prefill and not self.decode

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of the prefill call."""
        return sum(chunk.num_tokens for chunk in self.prefill)
