"""What a compile shows while it runs: a line per stage and a bar per program, with the time left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars


class Progress:
    """Bars on standard error; silent unless `shown`."""

    def __init__(self, shown: bool) -> None:
        self._bars = Bars(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=28),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._durations: list[float] = []

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A step that has no programs to count."""
        task = self._bars.add_task(name, total=None, note="")
        yield
        self._bars.update(task, total=1, completed=1, note="done")

    def program(self, name: str) -> None:
        """A program that will be built."""
        self._tasks[name] = self._bars.add_task(f"build {name}", total=1, start=False, note="waiting")

    def started(self, name: str) -> None:
        """Its worker runs."""
        self._started[name] = time.monotonic()
        self._bars.start_task(self._tasks[name])
        self._bars.update(self._tasks[name], note="export and compile")

    def done(self, name: str) -> None:
        """Its worker has ended well."""
        self._durations.append(time.monotonic() - self._started.pop(name))
        self._bars.update(self._tasks[name], completed=1, note="done")

    def tick(self) -> None:
        """Moves the bars of running programs by what finished ones took."""
        if not self._durations:
            return
        typical = sum(self._durations) / len(self._durations)
        for name, started in self._started.items():
            spent = time.monotonic() - started
            left = max(0.0, typical - spent)
            self._bars.update(
                self._tasks[name],
                completed=min(0.95, spent / typical),
                note=f"export and compile, about {left:.0f} s left",
            )
