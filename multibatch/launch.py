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
    """Of `step.sampled`, where each token is the maximum of the logits as they come, and nothing else is asked."""

    @property
    def idle_seconds(self) -> float:
        """Between the end of its programs and when somebody asked for it."""
        return 0.0 if self.started is None else self.started.idle_seconds
