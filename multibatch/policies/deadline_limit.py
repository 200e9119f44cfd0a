"""The deadline-constrained batch limit: as many sequences as keep the time between their tokens at a target.

Algorithm 2 of Pang, Li, Wang (arXiv 2503.05248, 2025): a binary search whose two ends never quite meet, so that it
follows a latency that drifts. It needs no model of the machine, only the times of the steps.
"""

from __future__ import annotations

from multibatch.errors import ConfigError
from multibatch.policies.base import Load


class DeadlineLimit:
    """Searches the batch size whose mean step time is the target, and goes on searching.

    After every `window` steps that had decode rows, with their mean time t and mean number of rows b:

    - t above target + tolerance: b is too many: high := max(b, low + alpha), low := max(low - delta, lower);
    - t below target - tolerance: b is too few: low := min(b, high - alpha), high := min(high + delta, upper);
    - else b is right: high := min(b + alpha // 2, upper), low := max(b - alpha // 2, lower);

    and the limit is halfway between, at least what decodes now and at most upper. alpha keeps the ends apart, delta lets
    them widen again. A window of 1 is the paper's loop with the caller's own mean.
    """

    def __init__(
        self,
        *,
        target_ms: float,
        lower: int,
        upper: int,
        alpha: int | None = None,
        delta: int | None = None,
        tolerance_ms: float | None = None,
        window: int = 8,
    ) -> None:
        """Starts with the whole range.

        Args:
            target_ms: wanted mean milliseconds between two tokens of a sequence.
            lower: never less than so many sequences.
            upper: never more.
            alpha: least distance of the two ends; default: an eighth of upper, at least 1.
            delta: how far an end moves back; default: a quarter of alpha, at least 1.
            tolerance_ms: how near the target is near enough; default: 5 % of it.
            window: steps per decision.

        Raises:
            ConfigError: a number outside what is allowed.
        """
        if not 1 <= lower <= upper:
            raise ConfigError(f"the batch limit is bounded by {lower} and {upper}; allowed: 1 <= lower <= upper")
        if not target_ms > 0:
            raise ConfigError(f"target_ms is {target_ms}; allowed: milliseconds above 0")
        self._target = target_ms
        self._tolerance = 0.05 * target_ms if tolerance_ms is None else tolerance_ms
        self._alpha = max(upper // 8, 1) if alpha is None else alpha
        self._delta = max(self._alpha // 4, 1) if delta is None else delta
        for name, value in {"tolerance_ms": self._tolerance, "alpha": self._alpha, "delta": self._delta}.items():
            if value < 0:
                raise ConfigError(f"{name} is {value}; allowed: 0 or more")
        if window < 1:
            raise ConfigError(f"window is {window}; allowed: 1 or more steps")
        self._window = window
        self._lower, self._upper = lower, upper
        self._low, self._high = lower, upper
        self._steps: list[tuple[int, float]] = []
        self._limit = upper

    @property
    def ends(self) -> tuple[int, int]:
        """Between which two sizes the search is."""
        return self._low, self._high

    def limit(self, load: Load) -> int:
        """See `BatchLimit`."""
        return min(max(self._limit, load.num_decoding), self._upper)

    def step_done(self, num_decoding: int, ms: float) -> None:
        """See `BatchLimit`; a step without decode rows says nothing of the time between tokens."""
        if not num_decoding:
            return
        self._steps.append((num_decoding, ms))
        if len(self._steps) == self._window:
            rows = round(sum(rows for rows, _ in self._steps) / self._window)
            self._search(rows, sum(ms for _, ms in self._steps) / self._window)
            self._steps.clear()

    def sequence_done(self, num_blocks: int) -> None:
        """Memory does not matter here."""

    def _search(self, rows: int, ms: float) -> None:
        low, high = self._low, self._high
        if ms > self._target + self._tolerance:
            self._high = max(rows, low + self._alpha)
            self._low = max(low - self._delta, self._lower)
        elif ms < self._target - self._tolerance:
            self._low = min(rows, high - self._alpha)
            self._high = min(high + self._delta, self._upper)
        else:
            self._high = min(rows + self._alpha // 2, self._upper)
            self._low = max(rows - self._alpha // 2, self._lower)
        # the paper bounds each end on one side only, which lets alpha push them out of the range
        self._high = min(max(self._high, self._lower), self._upper)
        self._low = min(max(self._low, self._lower), self._upper)
        self._limit = (self._low + self._high) // 2
