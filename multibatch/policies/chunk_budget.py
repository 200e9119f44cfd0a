"""How many prompt tokens may ride along with the decode rows of a step, so that it stays inside a target.

vllm-ascend's dynamic batch (`SLO_limits_for_dynamic_batch`, 2025-10 to 2026-07), where the table came with the
hardware, was scanned in the order of a hash table, and a miss allowed the most. Here it is measured by
`multibatch calibrate`, sorted, and a miss allows nothing: prompts wait until there are fewer decode rows. And the table is
corrected while it is used: a machine that has slowed down since the calibration gets smaller chunks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from multibatch.cost_table import CostTable
from multibatch.errors import ConfigError
from multibatch.trace import percentile

_WINDOW = 32
_QUANTILE = 99
_LARGEST_DRIFT = 4.0


class ChunkBudget:
    """Refines a step's budget of prompt tokens from a cost table."""

    def __init__(self, table: CostTable, target_ms: float) -> None:
        """Steps with decode rows are to take at most `target_ms`.

        Raises:
            ConfigError: not even the cheapest measured step with one decode row does.
        """
        cheapest = min((row.cost for row in table.rows if row.d_num), default=None)
        if cheapest is None or not target_ms >= cheapest:
            raise ConfigError(
                f"a step target of {target_ms} ms; the cheapest measured step with a decode row takes"
                f" {'- none was measured' if cheapest is None else f'{cheapest:.2f} ms'}: raise the target, or calibrate again"
            )
        self._table = table
        self._target = target_ms
        # measured over predicted ms of the latest steps with prompts and decode rows
        self._ratios: deque[float] = deque(maxlen=_WINDOW)

    @property
    def drift(self) -> float:
        """What steps take of what was calibrated: the 99th percentile of the last 32 that mixed prompts with decode rows.

        1 before the first of them. At most 4: one step that was held up must not stop all prompts.
        """
        return min(percentile(self._ratios, _QUANTILE), _LARGEST_DRIFT) if self._ratios else 1.0

    def refine(self, budget: int, context_lens: Sequence[int]) -> int:
        """At most `budget` prompt tokens for a step whose decode rows attend to so many tokens each.

        The mean context stands for all, because what attention reads is their sum.
        """
        if not context_lens:
            return budget
        mean = sum(context_lens) / len(context_lens)
        chunk = self._table.largest_chunk(mean, len(context_lens), self._target / self.drift)
        return 0 if chunk is None else min(chunk, budget)

    def step_done(self, context_lens: Sequence[int], num_prefill_tokens: int, ms: float) -> None:
        """See `StepBudget`. A step of decode rows alone forgets the oldest: where nothing fits, that is not for ever."""
        if context_lens and num_prefill_tokens:
            mean = sum(context_lens) / len(context_lens)
            self._ratios.append(ms / self._table.predict(mean, len(context_lens), num_prefill_tokens))
        elif self._ratios:
            self._ratios.popleft()
