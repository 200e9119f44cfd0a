"""Owns what a request is, the state of one that runs, and what is handed back for it, with vLLM's output fields.

Who runs when is decided in `multibatch.scheduler`; text is made in `multibatch.tokenizer`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Final

from multibatch.errors import RequestError
from multibatch.sampling_params import SamplingParams

_MASK32: Final = 2**32 - 1
_MASK64: Final = 2**64 - 1


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """A stop string, a stop token or the end-of-sequence token."""
    LENGTH = "length"
    """max_tokens, or the longest sequence that the model was compiled for."""
    ABORT = "abort"
    """The caller ended it."""
    ERROR = "error"
    """A step failed while it ran."""


class SequenceStatus(Enum):
    """Where a sequence is on its way."""

    WAITING = "waiting"
    """Not started, or preempted: holds no blocks."""
    RUNNING = "running"
    """Holds blocks."""
    FINISHED = "finished"
    """Done: holds no blocks, and has a finish reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and how it is to be continued.

    Raises:
        RequestError: it has no id, no prompt, a negative token id, or a seed beyond 64 bits.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    prompt: str | None = None
    arrival_time: float = 0.0
    """Wall clock, seconds."""
    seed: int
    """The request's own random stream, already resolved (see `resolve_seed`)."""
    eos_token_ids: tuple[int, ...] = ()
    """The model's end-of-sequence tokens, whether or not the request ignores them."""
    priority: int = 0
    """Lower numbers are served first, where the engine's policy is "priority"."""
    cache_salt: str | None = None
    """Shares cached prefixes only with requests of the same salt: nobody else can tell from the time what was asked."""

    @property
    def ending_token_ids(self) -> tuple[int, ...]:
        """Tokens that end it, once it has min_tokens."""
        eos = () if self.params.ignore_eos else self.eos_token_ids
        return (*eos, *self.params.stop_token_ids)

    def __post_init__(self) -> None:
        if not self.request_id:
            raise RequestError("request_id is empty; allowed: any other string. Give each request one.")
        if not self.prompt_token_ids:
            raise RequestError(
                f"request {self.request_id}: the prompt has 0 tokens; allowed: 1 or more."
                " Start it with the tokenizer's beginning-of-sequence token."
            )
        lowest = min(self.prompt_token_ids)
        if lowest < 0:
            raise RequestError(
                f"request {self.request_id}: prompt_token_ids has {lowest}; allowed: 0 or more. Check the tokenizer."
            )
        if not 0 <= self.seed <= _MASK64:
            raise RequestError(
                f"request {self.request_id}: seed is {self.seed}; allowed: 0 to {_MASK64}. Make it with resolve_seed."
            )


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one request while it is served; the only mutable object of its kind.

    Invariant: `token_ids` starts with the prompt, and `num_computed_tokens <= num_tokens`.
    """

    request: Request
    token_ids: list[int] = field(default_factory=list)
    """Prompt and output; the prompt alone if not given."""
    num_computed_tokens: int = 0
    """Positions whose keys and values are in the pool."""
    block_ids: list[int] = field(default_factory=list)
    """Blocks of the pool in order of position."""
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token or string that matched; None for end-of-sequence and every other reason."""
    num_preemptions: int = 0
    num_cached_tokens: int | None = None
    """Prompt tokens found in the pool when it was admitted first; None before that."""
    order: tuple[int, int] = (0, 0)
    """Its place in the queues: lower ones are served first (see `multibatch.queues`)."""
    block_keys: list[bytes] = field(default_factory=list)
    """Keys of its first full blocks, as far as they were asked for (see `multibatch.kv.prefix`)."""

    def __post_init__(self) -> None:
        if not self.token_ids:
            self.token_ids = list(self.request.prompt_token_ids)

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and the output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the output."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """A copy of the output's tokens."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will be added."""
        return self.status is SequenceStatus.FINISHED


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely a token was, by the model's own logits (before penalties and temperature)."""

    logprob: float
    rank: int | None = None
    """1 is the likeliest of the vocabulary."""
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When things happened to a request; vLLM's `RequestStateStats`, where None is what has not happened.

    `*_ts` are of one monotonic clock; only differences of them mean anything.
    """

    num_generation_tokens: int = 0
    num_preemptions: int = 0
    arrival_time: float = 0.0
    """Wall clock, seconds."""
    queued_ts: float | None = None
    scheduled_ts: float | None = None
    first_token_ts: float | None = None
    last_token_ts: float | None = None
    first_token_latency: float | None = None
    """Wall seconds from `arrival_time` to the first token."""
    num_cached_tokens: int | None = None
    """Prompt tokens found in the pool; vLLM has them in the output alone."""

    @property
    def queue_s(self) -> float | None:
        """Seconds from being queued to being scheduled first."""
        return _elapsed(self.queued_ts, self.scheduled_ts)

    @property
    def ttft_s(self) -> float | None:
        """Seconds from being queued to the first token."""
        return _elapsed(self.queued_ts, self.first_token_ts)

    @property
    def prefill_ms(self) -> float | None:
        """Milliseconds from being scheduled first to the first token."""
        return _milliseconds(self.scheduled_ts, self.first_token_ts)

    @property
    def decode_ms(self) -> float | None:
        """Milliseconds from the first token to the last so far."""
        return _milliseconds(self.first_token_ts, self.last_token_ts)

    @property
    def latency_ms(self) -> float | None:
        """Milliseconds from being queued to the last token so far."""
        return _milliseconds(self.queued_ts, self.last_token_ts)

    @property
    def time_per_output_token_s(self) -> float | None:
        """Mean seconds per token after the first; None below two tokens."""
        decode_s = _elapsed(self.first_token_ts, self.last_token_ts)
        if decode_s is None or self.num_generation_tokens < 2:
            return None
        return decode_s / (self.num_generation_tokens - 1)

    @property
    def e2e_s(self) -> float | None:
        """Seconds from being queued to the last token so far."""
        return _elapsed(self.queued_ts, self.last_token_ts)


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion of a request; vLLM's fields, those that are not filled yet being None."""

    index: int
    """Which of the request's `n` completions."""
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    """Per token of `token_ids`, if `SamplingParams.logprobs` asked; the drawn token is always included."""
    routed_experts: None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    lora_request: None = None
    sampling_mask: None = None
    spec_decode_metrics: None = None
    weight_versions: None = None

    def finished(self) -> bool:
        """Whether nothing more will be added."""
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What is handed back for a request; vLLM's fields, those that are not filled yet being None."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    """Per token of the prompt, if `SamplingParams.prompt_logprobs` asked: None first, then as `CompletionOutput.logprobs`.

    With output_kind DELTA only the first output has it, and the others an empty list.
    """
    outputs: list[CompletionOutput]
    finished: bool
    """Whether all completions are finished."""
    metrics: RequestMetrics | None = None
    lora_request: None = None
    encoder_prompt: None = None
    encoder_prompt_token_ids: None = None
    num_cached_tokens: int | None = None
    """Prompt tokens whose keys and values were already in the pool."""
    num_cache_creation_tokens: int | None = None
    prompt_token_id_logprobs: None = field(default=None, kw_only=True)
    kv_transfer_params: None = field(default=None, kw_only=True)
    ec_transfer_params: None = field(default=None, kw_only=True)


def resolve_seed(params_seed: int | None, request_index: int, engine_seed: int, *, child_index: int = 0) -> int:
    """Returns the 64-bit seed of one completion's random stream.

    A given seed is used as it is, plus `child_index` for the completions of `n > 1` (as vLLM does); without one the
    seed follows from the engine's seed and how many requests came before, so a run can be repeated.
    """
    if params_seed is not None:
        return (params_seed + child_index) & _MASK64
    return _mix(_mix(_mix(engine_seed) + request_index) + child_index)


def random_bits(seed: int, position: int) -> int:
    """53 random bits for one token: Philox 4x32-10 of the key `seed` at the counter `position`.

    Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (2011). No state: the same two numbers
    give the same bits in whatever batch, row or order they are asked for.
    """
    words = philox((position & _MASK32, position >> 32 & _MASK32, 0, 0), seed)
    return (words[0] << 32 | words[1]) >> 11


def philox(counter: tuple[int, int, int, int], key: int) -> tuple[int, int, int, int]:
    """Philox 4x32 with 10 rounds: four 32-bit words of a counter and a 64-bit key to four random ones."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK32, key >> 32 & _MASK32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & _MASK32, p0 >> 32 ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def _mix(value: int) -> int:
    """One step of SplitMix64 (Steele, Lea, Flood 2014; constants of Vigna's public-domain splitmix64.c)."""
    z = (value + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def _milliseconds(start: float | None, end: float | None) -> float | None:
    seconds = _elapsed(start, end)
    return None if seconds is None else seconds * 1000


def _elapsed(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start
