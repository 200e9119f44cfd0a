"""How many prompt tokens may ride along with the decode rows of a step, so that it stays inside a target.

vllm-ascend's dynamic batch (`SLO_limits_for_dynamic_batch`, 2025-10 to 2026-07), where the table came with the
hardware, was scanned in the order of a hash table, and a miss allowed the most. Here it is measured by
`multibatch calibrate`, sorted, and a miss allows nothing: prompts wait until there are fewer decode rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from multibatch.cost_table import CostTable
from multibatch.errors import ConfigError


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

    def refine(self, budget: int, context_lens: Sequence[int]) -> int:
        """At most `budget` prompt tokens for a step whose decode rows attend to so many tokens each.

        The mean context stands for all, because what attention reads is their sum.
        """
        if not context_lens:
            return budget
        mean = sum(context_lens) / len(context_lens)
        chunk = self._table.largest_chunk(mean, len(context_lens), self._target)
        return 0 if chunk is None else min(chunk, budget)
