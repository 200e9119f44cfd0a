"""What a step was measured to cost, by context length, decode rows and prompt tokens; nothing is decided here.

As CSV it has the columns of vllm-ascend's dynamic batch tables: `ctx_len,d_num,chunk_size,cost`.
"""

from __future__ import annotations

import csv
import io
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

from multibatch.errors import ConfigError


@dataclass(frozen=True, slots=True, order=True)
class CostRow:
    """One measured step."""

    ctx_len: int
    """Tokens that each decode row attends to; at most so many."""
    d_num: int
    """Decode rows; 0 is a step of prompts alone."""
    chunk_size: int
    """Prompt tokens that ride along; 0 is a step of decode rows alone."""
    cost: float
    """Milliseconds."""

    def is_within(self, other: CostRow) -> bool:
        """Whether the other step does all that this one does. Of one without decode rows the context does not count."""
        fits = self.d_num <= other.d_num and self.chunk_size <= other.chunk_size
        return fits and (not self.d_num or self.ctx_len <= other.ctx_len)


@dataclass(frozen=True, slots=True)
class Slowdown:
    """How many times as long steps take as a table says."""

    decode: float = 1.0
    """Of steps of decode rows alone."""
    prompts: float = 1.0
    """Of steps with prompt tokens."""


class CostTable:
    """Measured steps on a grid, looked up and interpolated.

    Steps without decode rows do not depend on ctx_len, and are measured at one of them.
    """

    def __init__(self, rows: Iterable[CostRow]) -> None:
        """Takes the rows in any order.

        Raises:
            ConfigError: there is none, one is measured twice, or a number is not what it may be.
        """
        self.rows = tuple(sorted(rows))
        if not self.rows:
            raise ConfigError("a cost table without rows; measure one with multibatch calibrate")
        # (chunk_size, cost) by (ctx_len, d_num), ascending as the rows are
        self._costs: dict[tuple[int, int], list[tuple[int, float]]] = {}
        for row in self.rows:
            _check(row)
            chunks = self._costs.setdefault((row.ctx_len, row.d_num), [])
            if chunks and chunks[-1][0] == row.chunk_size:
                where = f"ctx_len {row.ctx_len}, d_num {row.d_num}, chunk_size {row.chunk_size}"
                raise ConfigError(f"a cost table with two rows for {where}; each may be there once")
            chunks.append((row.chunk_size, row.cost))
        self.ctx_lens = tuple(sorted({ctx for ctx, d_num in self._costs if d_num}))
        self.d_nums = tuple(sorted({d_num for _, d_num in self._costs if d_num}))
        self._ctx_lens_of = {d: tuple(ctx for ctx in self.ctx_lens if (ctx, d) in self._costs) for d in self.d_nums}

    @classmethod
    def from_csv(cls, text: str, source: str = "the cost table") -> CostTable:
        """Reads `ctx_len,d_num,chunk_size,cost` with a header; further columns are ignored.

        Raises:
            ConfigError: a column is missing, or a line is not four numbers; names the line.
        """
        reader = csv.DictReader(io.StringIO(text))
        wanted = [field.name for field in fields(CostRow)]
        missing = [name for name in wanted if name not in (reader.fieldnames or ())]
        if missing:
            raise ConfigError(
                f"{source} has no column {', '.join(missing)}; its first line has to be {','.join(wanted)}"
            )
        rows = []
        for line in reader:
            try:
                ctx_len, d_num, chunk_size = (int(line[name]) for name in wanted[:3])
                rows.append(CostRow(ctx_len, d_num, chunk_size, float(line["cost"])))
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"{source}, line {reader.line_num}: {error}; allowed: three ints and a number"
                ) from error
        return cls(rows)

    def to_csv(self) -> str:
        """The table as `from_csv` reads it."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(field.name for field in fields(CostRow))
        writer.writerows((row.ctx_len, row.d_num, row.chunk_size, row.cost) for row in self.rows)
        return text.getvalue()

    def monotone(self) -> CostTable:
        """With costs that do not fall where context, rows or prompt grow, as they cannot: what does is the machine's unrest.

        Each becomes the mean of the dearest step that it contains and of the cheapest that contains it. Costs that rise
        already stay.
        """
        below = {row: max(other.cost for other in self.rows if other.is_within(row)) for row in self.rows}
        above = {row: min(other.cost for other in self.rows if row.is_within(other)) for row in self.rows}
        return CostTable(replace(row, cost=(below[row] + above[row]) / 2) for row in self.rows)

    def scaled(self, by: Slowdown) -> CostTable:
        """The same steps, that many times as long."""
        factor = {False: by.decode, True: by.prompts}
        return CostTable(replace(row, cost=row.cost * factor[row.chunk_size > 0]) for row in self.rows)

    def largest_chunk(self, ctx_len: float, d_num: int, target_ms: float) -> int | None:
        """The most prompt tokens that may ride along with d_num >= 1 decode rows inside the target.

        Both are rounded up to what was measured, because a longer context or another row only costs more.

        Returns:
            A measured chunk_size; None where no measured step is inside, or nothing as large was measured.
        """
        ctx_key, d_key = _next_up(self.ctx_lens, ctx_len), _next_up(self.d_nums, d_num)
        if ctx_key is None or d_key is None:
            return None
        chunks = self._costs.get((ctx_key, d_key), [])
        return max((chunk for chunk, cost in chunks if cost <= target_ms), default=None)

    def predict(self, ctx_len: float, d_num: int, chunk_size: int) -> float:
        """Milliseconds of a step, linear between what was measured, and along the last two points beyond it.

        Raises:
            ConfigError: the rows around it are not in the table.
        """
        if not d_num:
            groups = [group for group in self._costs if not group[1]]
            if not groups:
                raise ConfigError("the cost table has no steps of prompts alone (d_num 0); calibrate again")
            return _interpolate(self._costs[groups[0]], chunk_size)
        if not self.d_nums:
            raise ConfigError("the cost table has no steps with decode rows; calibrate again")
        by_rows = []
        for d_key in _around(self.d_nums, d_num):
            by_ctx = [
                (ctx, _interpolate(self._costs[ctx, d_key], chunk_size))
                for ctx in _around(self._ctx_lens_of[d_key], ctx_len)
            ]
            by_rows.append((d_key, _interpolate(by_ctx, ctx_len)))
        return _interpolate(by_rows, d_num)


def _around(keys: tuple[int, ...], x: float) -> tuple[int, ...]:
    """The two of the ascending keys that x is between or, beyond the last, nearest to; up to the first, the first."""
    if x <= keys[0]:
        return keys[:1]
    index = min(bisect_left(keys, x), len(keys) - 1)
    return keys[max(index - 1, 0) : index + 1]


def _interpolate(points: Sequence[tuple[int, float]], x: float) -> float:
    """The value at x of the line through the two points around it; below the first point, the first's value."""
    if len(points) == 1 or x <= points[0][0]:
        return points[0][1]
    index = min(bisect_left(points, x, key=lambda point: point[0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    return max(y0 + (y1 - y0) * (x - x0) / (x1 - x0), 0.0)


def _next_up(keys: tuple[int, ...], value: float) -> int | None:
    index = bisect_left(keys, value)
    return keys[index] if index < len(keys) else None


def _check(row: CostRow) -> None:
    for name, least in {"ctx_len": 0, "d_num": 0, "chunk_size": 0}.items():
        if getattr(row, name) < least:
            raise ConfigError(f"a cost table with {name} {getattr(row, name)}; allowed: {least} or more")
    if not row.d_num and not row.chunk_size:
        raise ConfigError("a cost table with a step of no decode rows and no prompt tokens; that is no step")
    if not (math.isfinite(row.cost) and row.cost > 0):
        raise ConfigError(f"a cost table with a cost of {row.cost} ms; allowed: a finite number above 0")
