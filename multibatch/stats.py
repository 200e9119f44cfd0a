"""What an engine has done since it started, in counters and histograms that cost a step microseconds.

The engine's thread adds; any other may read, and finds figures that are whole, if perhaps of two successive moments. What
is counted is vLLM's, with its buckets: each of a request's n completions is a request here, as there. How it is written
out is decided in `multibatch.exposition`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from multibatch.request import FinishReason

_TTFT_S: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_PER_TOKEN_S: Final = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_S: Final = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_STEP_TOKENS: Final = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_COMPLETIONS: Final = (1, 2, 5, 10, 20)


class Histogram:
    """Numbers of observations by size."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """Buckets up to each of `bounds`, itself included, and one for what is beyond."""
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts a value."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionTimes:
    """When things happened to one completion, of one monotonic clock; None is what did not."""

    queued: float
    scheduled: float | None
    first_token: float | None
    last_token: float | None
    ended: float


class EngineStats:
    """The figures of one engine. Attributes have vLLM's names without units where those are seconds or tokens."""

    def __init__(self, max_seq_len: int) -> None:
        """Starts with zeros; no sequence gets longer than `max_seq_len`."""
        lengths = _one_two_five(max_seq_len)
        self.num_preemptions = 0
        self.prompt_tokens = 0
        """Of prompts that were computed to their end, cached tokens included."""
        self.prompt_tokens_cached = 0
        self.generation_tokens = 0
        self.ended = dict.fromkeys(FinishReason, 0)
        self.time_to_first_token = Histogram(_TTFT_S)
        self.inter_token_latency = Histogram(_PER_TOKEN_S)
        self.request_time_per_output_token = Histogram(_PER_TOKEN_S)
        self.e2e_request_latency = Histogram(_REQUEST_S)
        self.request_queue_time = Histogram(_REQUEST_S)
        self.request_prefill_time = Histogram(_REQUEST_S)
        self.request_decode_time = Histogram(_REQUEST_S)
        self.request_inference_time = Histogram(_REQUEST_S)
        self.request_prompt_tokens = Histogram(lengths)
        self.request_generation_tokens = Histogram(lengths)
        self.request_params_n = Histogram(_COMPLETIONS)
        self.request_params_max_tokens = Histogram(lengths)
        self.iteration_tokens = Histogram(_STEP_TOKENS)
        """Tokens that a step computed, of prompts and of decode rows."""

        self.step_seconds = 0.0
        """Of the steps whose time could be predicted."""
        self.step_predicted_seconds = 0.0
        """What was predicted for them."""

    def step_predicted(self, predicted: float, measured: float) -> None:
        """A step ended for which there was a prediction, both in seconds."""
        self.step_predicted_seconds += predicted
        self.step_seconds += measured

    def first_token(self, num_prompt_tokens: int, num_cached_tokens: int, seconds: float) -> None:
        """A completion got its first token, so long after it was queued."""
        self.prompt_tokens += num_prompt_tokens
        self.prompt_tokens_cached += num_cached_tokens
        self.generation_tokens += 1
        self.time_to_first_token.observe(seconds)

    def next_tokens(self, seconds: float, num_tokens: int) -> None:
        """So many completions got another token, each so long after its last."""
        self.generation_tokens += num_tokens
        self.inter_token_latency.observe(seconds, num_tokens)

    def completion_ended(
        self, reason: FinishReason, num_prompt_tokens: int, num_output_tokens: int, times: CompletionTimes
    ) -> None:
        """One of a request's completions ended, for whatever reason."""
        self.ended[reason] += 1
        self.request_prompt_tokens.observe(num_prompt_tokens)
        self.request_generation_tokens.observe(num_output_tokens)
        self.e2e_request_latency.observe(times.ended - times.queued)
        if times.scheduled is None:
            return
        self.request_queue_time.observe(times.scheduled - times.queued)
        if times.first_token is None or times.last_token is None:
            return
        decode = times.last_token - times.first_token
        self.request_prefill_time.observe(times.first_token - times.scheduled)
        self.request_decode_time.observe(decode)
        self.request_inference_time.observe(times.last_token - times.scheduled)
        if num_output_tokens > 1:
            self.request_time_per_output_token.observe(decode / (num_output_tokens - 1))

    def request_ended(self, n: int, max_tokens: int | None) -> None:
        """All completions of a request have ended."""
        self.request_params_n.observe(n)
        if max_tokens is not None:
            self.request_params_max_tokens.observe(max_tokens, n)


def _one_two_five(highest: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to `highest`."""
    powers = (10**exponent for exponent in range(len(str(highest))))
    return [bound for power in powers for bound in (power, 2 * power, 5 * power) if bound <= highest]
