"""A planned step on its way: what was begun of it, and what its tokens will be drawn by."""

from __future__ import annotations

from dataclasses import dataclass

from multibatch.runner import StartedStep
from multibatch.sampling_row import SamplingRow
from multibatch.scheduled_step import ScheduledStep


@dataclass(slots=True)
class Launch:
    """A step between its planning and its tokens."""

    step: ScheduledStep
    begin: float
    """When it was planned, of `time.monotonic`."""
    started: StartedStep | None = None
    """None where it is computed when somebody waits for it."""
    error: RuntimeError | None = None
    """Why it could not be begun."""
    rows: list[SamplingRow] | None = None
    """See `StepSampler.known_rows`."""
    next_rows: list[SamplingRow] | None = None
    """Those of the step that may follow it."""

    @property
    def followed(self) -> StartedStep | None:
        """The step that follows it, if it was waited for and one has begun."""
        result = None if self.started is None else self.started.result
        return None if result is None else result.followed
