"""What a planned step is expected to take, from whatever was measured."""

from __future__ import annotations

from multibatch.cost import CostModel
from multibatch.cost_table import CostTable
from multibatch.errors import ConfigError
from multibatch.scheduled_step import ScheduledStep
from multibatch.selector import Selector


class StepTimes:
    """By the cost table where there is one; else by the decoders' own times, of steps without prompts."""

    def __init__(self, table: CostTable | None, selector: Selector, cost: CostModel) -> None:
        """Joins what is known.

        Args:
            table: what whole steps were measured to take.
            selector: which decoders the rows go to.
            cost: what the decoders were measured to take when they were compiled.
        """
        self._table = table
        self._selector = selector
        self._cost = cost

    def predict(self, step: ScheduledStep) -> float | None:
        """Milliseconds of a step whose tokens have not been sampled yet; None where too little was measured."""
        if self._table is not None:
            try:
                return predict_step(self._table, step)
            except ConfigError:  # a table from elsewhere may lack prompts alone
                return None
        if step.prefill or not step.decode:
            return None
        total = 0.0
        for slot in self._selector.select(len(step.decode)):
            ms = self._cost.ms(slot.batch_size)
            if ms is None:
                return None
            total += ms
        return total


def predict_step(table: CostTable, step: ScheduledStep) -> float:
    """Milliseconds by the table, whose decode rows all have the mean context.

    Raises:
        ConfigError: the table does not have such steps.
    """
    rows = len(step.decode)
    mean = sum(sequence.num_computed_tokens for sequence in step.decode) / rows if rows else 0.0
    return table.predict(mean, rows, step.num_prefill_tokens)
