"""The errors that multibatch raises at its users, as one tree.

    MultibatchError
    ├── ArtifactError            a folder that cannot be opened or published
    │   ├── ArtifactCorruptError     a file is missing, truncated or changed
    │   └── IncompatibleError        built for another schema, torch version or processor
    ├── CompileError             a model that cannot be compiled
    │   └── UnsupportedModelError    an architecture, dtype or device that is not handled, by name
    ├── ConfigError              an option outside what is allowed (also a ValueError)
    ├── RequestError             a request that can never run here (also a ValueError)
    ├── CapacityError            too little memory or too small a ladder for what was asked
    ├── QueueFullError           too many requests wait already; may be tried again
    ├── StepError                a step failed while it ran; names the requests that failed with it
    ├── EngineDeadError          an engine's thread has ended, asked to or not; names the request it ended
    └── VerificationError        a program or an artifact does not do what it should

A message says what, got, allowed, and what to do. `exit_code` is what the command line ends with.
"""

from __future__ import annotations

from collections.abc import Sequence


class MultibatchError(Exception):
    """Base of everything multibatch raises on purpose."""

    exit_code = 1


class ArtifactError(MultibatchError):
    """An artifact folder that cannot be opened, changed or published."""


class ArtifactCorruptError(ArtifactError):
    """A file of the artifact is missing, truncated or not the one that was built."""


class IncompatibleError(ArtifactError):
    """The artifact was built for another schema, torch version or processor."""


class CompileError(MultibatchError):
    """The compile step could not build what was asked."""


class UnsupportedModelError(CompileError):
    """The model needs something that multibatch does not handle; the message names it."""


class ConfigError(MultibatchError, ValueError):
    """An option has a value outside what is allowed."""

    exit_code = 2


class RequestError(MultibatchError, ValueError):
    """A request that can never run on this engine, refused at the door."""

    exit_code = 2


class CapacityError(MultibatchError):
    """The memory or the ladder is too small for what was asked."""


class VerificationError(MultibatchError):
    """A program or an artifact gives other results than it should."""


class QueueFullError(MultibatchError):
    """A request that found no place, neither among those that run nor among those that may wait.

    Attributes:
        num_unfinished: sequences that ran or waited.
        limit: how many may.
    """

    def __init__(self, message: str, num_unfinished: int = 0, limit: int = 0) -> None:
        super().__init__(message)
        self.num_unfinished = num_unfinished
        self.limit = limit


class StepError(MultibatchError):
    """A step failed while it ran.

    Attributes:
        request_ids: the requests that failed with it; all others go on.
    """

    def __init__(self, message: str, request_ids: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.request_ids = tuple(request_ids)


class EngineDeadError(MultibatchError):
    """An engine whose thread has ended: it was shut down, or died of the error that is this one's cause.

    Attributes:
        request_id: the request that this ended; None where it is about the engine itself.
    """

    def __init__(self, message: str, request_id: str | None = None) -> None:
        super().__init__(message)
        self.request_id = request_id
