"""The memory-aware batch limit: as many sequences as the pool will hold when they have grown.

Algorithm 1 of Pang, Li, Wang, "Optimizing LLM Inference Throughput via Memory-aware and SLA-constrained Dynamic
Batching" (arXiv 2503.05248, 2025), in two forms. Both are computed anew only while sequences wait *and* run, and
keep the last answer otherwise.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal, get_args

from multibatch.errors import ConfigError
from multibatch.policies.base import Load

TailBound = Literal["normal", "cantelli"]


class LinearMemoryLimit:
    """The pool times a factor, over the mean blocks of a running sequence *now*: the form of the authors' repository."""

    def __init__(self, *, lower: int, upper: int, memory_factor: float = 0.95) -> None:
        """Starts at `upper`.

        Args:
            lower: never less than so many sequences.
            upper: never more.
            memory_factor: share of the pool that may be planned with, in (0, 1].

        Raises:
            ConfigError: a number outside what is allowed.
        """
        _check_bounds(lower, upper)
        if not 0 < memory_factor <= 1:
            raise ConfigError(f"memory_factor is {memory_factor}; allowed: a number in (0, 1]; 0.95 is usual")
        self._lower, self._upper, self._factor = lower, upper, memory_factor
        self._previous = upper

    def limit(self, load: Load) -> int:
        """See `BatchLimit`."""
        if load.num_waiting and load.num_running and load.num_held_blocks:
            per_sequence = load.num_held_blocks / load.num_running
            wanted = math.floor(load.num_total_blocks * self._factor / per_sequence)
            self._previous = min(max(wanted, load.num_running, self._lower), self._upper)
        return self._previous

    def step_done(self, num_decoding: int, ms: float) -> None:
        """Time does not matter here."""

    def sequence_done(self, num_blocks: int) -> None:
        """Only what runs now matters here."""


class StatisticalMemoryLimit:
    """The most sequences whose *final* sizes overflow the pool with a probability of at most epsilon.

    With final sizes of mean m and variance s^2 (in blocks, of the latest k sequences that ended), b further ones add up to
    b m on average, with variance s^2 (b + b^2 / k): their own, and what k samples leave unknown of m. They stay within
    the n blocks of the pool with probability 1 - epsilon if

        b m + theta s sqrt(b + b^2 / k) <= n.

    theta is the normal quantile of 1 - epsilon (the paper's central limit theorem), with the first term of Cornish and
    Fisher (1937) for lengths that are skewed: theta + (theta^2 - 1) skewness / (6 sqrt(b)), where that is more. Or
    Cantelli's sqrt((1 - epsilon) / epsilon), which holds for every distribution and is far more careful. With exponential
    lengths the normal bound is met to the digit; with log-normal ones of sigma 1 the 5 % are 5.4 to 6.8.
    The paper's own run-time form, floor((n - L0) / m) with L0 = n - (theta s + m), is not used: taken literally it
    admits more than this. Until enough sequences have ended, what requests declare (prompt and max_tokens) stands for m.
    """

    def __init__(
        self,
        *,
        lower: int,
        upper: int,
        epsilon: float = 0.05,
        bound: TailBound = "normal",
        window: int = 256,
        least_samples: int = 16,
    ) -> None:
        """Starts at `upper`, with nothing known of sizes.

        Args:
            lower: never less than so many sequences.
            upper: never more.
            epsilon: allowed probability that all of them at their final size exceed the pool, in (0, 0.5].
            bound: "normal" or "cantelli", see above.
            window: sizes of so many ended sequences are remembered.
            least_samples: before so many, declared sizes are used; at least 2.

        Raises:
            ConfigError: a number outside what is allowed.
        """
        _check_bounds(lower, upper)
        if not 0 < epsilon <= 0.5:
            raise ConfigError(f"epsilon is {epsilon}; allowed: a probability in (0, 0.5]; 0.05 is usual")
        if not 2 <= least_samples <= window:
            raise ConfigError(f"least_samples is {least_samples}; allowed: 2 to window, which is {window}")
        self._lower, self._upper = lower, upper
        if bound not in get_args(TailBound):
            raise ConfigError(f"bound is {bound!r}; allowed: {', '.join(get_args(TailBound))}")
        self._is_normal = bound == "normal"
        self._theta = NormalDist().inv_cdf(1 - epsilon) if self._is_normal else math.sqrt((1 - epsilon) / epsilon)
        self._sizes: deque[int] = deque(maxlen=window)
        self._least_samples = least_samples
        self._previous = upper

    def limit(self, load: Load) -> int:
        """See `BatchLimit`."""
        if load.num_waiting and load.num_running:
            if len(self._sizes) < self._least_samples:
                declared = load.declared_blocks / (load.num_waiting + load.num_running)
                wanted = math.floor(load.num_total_blocks / declared)
            else:
                wanted = self.most_that_fit(load.num_total_blocks)
            self._previous = min(max(wanted, load.num_running, self._lower), self._upper)
        return self._previous

    def most_that_fit(self, num_blocks: int) -> int:
        """The most sequences for a pool of so many blocks, by the sizes seen so far; there have to be two."""
        k, mean, deviation, skewness = _moments(self._sizes)
        low, high = 0, math.floor(num_blocks / mean)
        while low < high:  # both sides of the inequality grow with b
            b = (low + high + 1) // 2
            theta = self._theta
            if self._is_normal:
                theta += max((theta * theta - 1) * skewness / (6 * math.sqrt(b)), 0.0)
            fits = b * mean + theta * deviation * math.sqrt(b + b * b / k) <= num_blocks
            low, high = (b, high) if fits else (low, b - 1)
        return low

    def step_done(self, num_decoding: int, ms: float) -> None:
        """Time does not matter here."""

    def sequence_done(self, num_blocks: int) -> None:
        """See `BatchLimit`."""
        self._sizes.append(num_blocks)


def _moments(sizes: Sequence[int]) -> tuple[int, float, float, float]:
    """Number, mean, standard deviation and skewness."""
    k = len(sizes)
    mean = sum(sizes) / k
    deviation = math.sqrt(sum((size - mean) ** 2 for size in sizes) / (k - 1))
    if not deviation:
        return k, mean, 0.0, 0.0
    return k, mean, deviation, sum(((size - mean) / deviation) ** 3 for size in sizes) / k


def _check_bounds(lower: int, upper: int) -> None:
    if not 1 <= lower <= upper:
        raise ConfigError(f"the batch limit is bounded by {lower} and {upper}; allowed: 1 <= lower <= upper")
