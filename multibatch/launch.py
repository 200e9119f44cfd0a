"""A planned step on its way: what was begun of it, and what its tokens will be drawn by."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
    """Why it could not be begun, or why it failed where somebody waited for it before it was wanted."""
    found: tuple[torch.Tensor, torch.Tensor | None] | None = None
    """What `Runner.finish` gave, where somebody waited for it before it was wanted."""
    waited: float | None = None
    """When that was, of `time.monotonic`; what passes since then is none of the step's time."""
    rows: list[SamplingRow] | None = None
    """Of `step.sampled`, where each token is the maximum of the logits as they come, and nothing else is asked."""

    @property
    def idle_seconds(self) -> float:
        """In which it was begun and did not run."""
        return 0.0 if self.started is None else self.started.idle_seconds
