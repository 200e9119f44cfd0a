"""Decoders captured as graphs: which size is captured, when, and what happens where it cannot be.

Wraps the programs of a backend. A graph replays one decoder on buffers of its own, the search for the greedy tokens included, so
a step costs one launch instead of one per kernel. A started call is queued on the device, and so is the call that follows it:
its tokens go from one to the other without the host. Everything that touches a device goes through `GraphDevice`;
`cuda_device.py` is the one for CUDA.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch

from multibatch.backends.base import CallResult, LoadedPrograms
from multibatch.backends.static_inputs import StaticInputs, staged_for
from multibatch.batch import ProgramInputs, decode_inputs
from multibatch.device_draws import draw_rows
from multibatch.errors import ConfigError
from multibatch.kv.pool import KVPool
from multibatch.logit_passes import DrawOptions
from multibatch.manifest import decoder_name

CaptureMode = Literal["eager", "lazy"]
CaptureState = Literal["pending", "captured", "out_of_memory", "dropped"]


Outputs = tuple[torch.Tensor, torch.Tensor]
"""Logits [R, V], and `LogitPasses.highest` of them, int64[R]."""


class Graph(Protocol):
    """Work that was captured once and can be repeated."""

    def replay(self) -> None:
        """Repeats it on the same memory, behind what the current stream holds already."""
        ...


class Mark(Protocol):
    """A place in the device's queue of work."""

    def wait(self) -> None:
        """Waits until all that was queued before it is done."""
        ...

    def seconds_since(self, earlier: Any) -> float:
        """How long the device took from another mark to this one; both were waited for."""
        ...


class GraphDevice(Protocol):
    """What capturing needs of a device."""

    @property
    def device(self) -> torch.device:
        """Where the programs' tensors live."""
        ...

    def new_pool(self) -> Any:
        """Memory that several graphs share, as no two of them run at once."""
        ...

    def mark(self) -> Mark:
        """Marks the end of what is queued now."""
        ...

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Queues a copy to the host; it may be read once a later mark was waited for."""
        ...

    def capture(self, call: Callable[[], Outputs], pool: Any) -> tuple[Graph, Outputs]:
        """Runs `call` until it is warm, captures it, and returns the graph and the tensors that each replay fills.

        Raises:
            torch.OutOfMemoryError: there is too little memory; nothing of the capture is left but unused memory.
        """
        ...

    def free_memory(self) -> int:
        """Bytes that nobody has taken, once all work is done."""
        ...

    def release(self) -> None:
        """Gives back memory that no tensor and no graph uses."""
        ...


@dataclass(slots=True)
class CapturedSize:
    """What became of one decode batch size, and what it did since."""

    batch_size: int
    state: CaptureState = "pending"
    num_bytes: int = 0
    """Free memory that the capture took, its static inputs included."""
    seconds: float = 0.0
    """Wall time of the capture, warm-up included."""
    num_replays: int = 0
    num_uncaptured: int = 0
    """Calls that ran the program itself: before its capture, after it was dropped, without memory, or on another pool."""


@dataclass(frozen=True, slots=True)
class _CapturedDecoder:
    graph: Graph
    static: StaticInputs
    outputs: Outputs


@dataclass(frozen=True, slots=True)
class _Fed:
    """Tokens of the call before, on the device; the first `num_rows` are those of the next one."""

    tokens: torch.Tensor
    num_rows: int

    def write(self, token_ids: torch.Tensor) -> None:
        """Into int64[1, T]. A row without a token gets 0: it ends, and nobody reads what it gives."""
        token_ids[0, : self.num_rows] = self.tokens[: self.num_rows].clamp(min=0)


@dataclass(frozen=True, slots=True)
class _Chain:
    """Calls that follow each other, the first on an idle device: so its clock and the host's are read at one moment."""

    begin: Mark
    begun: float
    """By the host's clock, seconds."""

    def seconds_past(self, mark: Mark, now: float) -> float:
        """Since the device came to a mark that was waited for."""
        return max(0.0, now - self.begun - mark.seconds_since(self.begin))


class CapturedPrograms:
    """`LoadedPrograms` whose decoders are replayed where they are captured; prefill and step programs run as they are.

    Sizes are captured largest first, so that smaller ones find room in what the largest took. A size that cannot be
    captured runs its program, more slowly: a warning names it, and `sizes` counts such calls. Not thread-safe.
    """

    can_start = True

    def __init__(
        self,
        programs: LoadedPrograms,
        device: GraphDevice,
        sizes: Iterable[int],
        *,
        max_blocks: int,
        block_size: int,
        capture: CaptureMode = "eager",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Captures nothing yet: `bind` does, once the pool exists.

        Args:
            programs: holding the decoder of every size.
            device: where to capture.
            sizes: decode batch sizes.
            max_blocks: columns of the block tables, M.
            block_size: of the pool.
            capture: "eager": all sizes in `bind`. "lazy": a size's first call runs its program, its second captures it.
            clock: seconds.

        Raises:
            ConfigError: another `capture`.
        """
        if capture not in get_args(CaptureMode):
            raise ConfigError(f"capture is {capture!r}; allowed: {', '.join(get_args(CaptureMode))}")
        # Row by row would wait for the device at each of them.
        draw_tokens = programs.passes.draw_tokens or draw_rows
        self.passes = dataclasses.replace(programs.passes, draw_tokens=draw_tokens)
        self.own_threads = programs.own_threads
        self._programs, self._device, self._clock = programs, device, clock
        self._max_blocks, self._block_size, self._capture_mode = max_blocks, block_size, capture
        self._records = {size: CapturedSize(size) for size in sorted(sizes, reverse=True)}
        self._sizes = {decoder_name(size): size for size in self._records}
        self._captured: dict[int, _CapturedDecoder] = {}
        self._kv: KVPool | None = None
        self._graph_pool: Any = None

    @property
    def sizes(self) -> tuple[CapturedSize, ...]:
        """A record per size, the largest first; it goes on changing."""
        return tuple(self._records[size] for size in sorted(self._records, reverse=True))

    @property
    def num_bytes(self) -> int:
        """Free memory that all captures took that are held now."""
        return sum(self._records[size].num_bytes for size in self._captured)

    def bind(self, pool: KVPool) -> None:
        """Captures for this pool, whose addresses the graphs will hold. What was captured for another is released.

        To know what graphs take before the pool is sized, bind one of two blocks first, read `num_bytes`, and bind again.
        """
        self._captured.clear()
        self._device.release()
        self._kv = pool
        for record in self.sizes:
            if record.state != "dropped":
                record.state = "pending"
                if self._capture_mode == "eager":
                    self._capture(record)

    def add(self, size: int) -> CapturedSize:
        """Captures one size more, or one that was dropped or had no memory; lazily, when it is used.

        Raises:
            ConfigError: it is captured already, or about to be.
        """
        record = self._records.get(size) or CapturedSize(size)
        if size in self._records and record.state in ("captured", "pending"):
            raise ConfigError(f"decode batch size {size} is {record.state} already; nothing to add")
        record.state = "pending"
        self._records[size], self._sizes[decoder_name(size)] = record, size
        if self._capture_mode == "eager" and self._kv is not None:
            self._capture(record)
        return record

    def drop(self, size: int) -> None:
        """Releases a size's graph; its program goes on answering.

        Raises:
            ConfigError: there is no such size.
        """
        if size not in self._records:
            known = ", ".join(str(record.batch_size) for record in self.sizes)
            raise ConfigError(f"decode batch size {size} is not there to be dropped; allowed: {known}")
        self._records[size].state = "dropped"
        self._captured.pop(size, None)
        self._device.release()

    def capture_next(self) -> CapturedSize | None:
        """Captures one pending size, for idle time: one that was used before one that was not, then the largest."""
        pending = [record for record in self.sizes if record.state == "pending"]
        if not pending or self._kv is None:
            return None
        record = max(pending, key=lambda r: (r.num_uncaptured > 0, r.batch_size))
        self._capture(record)
        return record

    def run(self, program: str, inputs: ProgramInputs, pool: KVPool) -> torch.Tensor:
        """See `base.LoadedPrograms.run`. The inputs are on the host; the logits are on the device, the caller's own."""
        return self._queue(program, inputs, pool)[0]

    def start(self, program: str, inputs: ProgramInputs, pool: KVPool, draws: DrawOptions | None = None) -> QueuedCall:
        """See `base.LoadedPrograms.start`."""
        return self._begin(program, inputs, pool, draws)

    def settle(self) -> None:
        """See `base.LoadedPrograms.settle`."""
        with contextlib.suppress(RuntimeError):  # an error of the device was told by the call that met it
            self._device.mark().wait()

    def _begin(
        self,
        program: str,
        inputs: ProgramInputs,
        pool: KVPool,
        draws: DrawOptions | None,
        fed: _Fed | None = None,
        chain: _Chain | None = None,
    ) -> QueuedCall:
        begin = self._device.mark()
        chain = chain or _Chain(begin, self._clock())
        logits, tokens = self._queue(program, inputs, pool, fed)
        if draws is not None:
            assert self.passes.draw_tokens is not None
            tokens = self.passes.draw_tokens(logits[: len(draws.temperature)], draws)
        on_host = self._device.to_host(tokens)

        def follow(next_inputs: ProgramInputs, num_rows: int, next_draws: DrawOptions | None) -> QueuedCall:
            return self._begin(program, next_inputs, pool, next_draws, _Fed(tokens, num_rows), chain)

        end = self._device.mark()
        return QueuedCall(logits, on_host, begin, end, follow, lambda: chain.seconds_past(end, self._clock()))

    def _queue(self, program: str, inputs: ProgramInputs, pool: KVPool, fed: _Fed | None = None) -> Outputs:
        """Queues a call; its outputs are the caller's own."""
        size = self._sizes.get(program)
        record = None if size is None else self._records[size]
        if record is not None and record.state == "pending" and record.num_uncaptured and pool is self._kv:
            self._capture(record)
        captured = None if size is None or pool is not self._kv else self._captured.get(size)
        if record is None or captured is None:
            if record is not None:
                record.num_uncaptured += 1
            to = self._device.device
            moved = ProgramInputs(*(staged_for(t, to).to(to, non_blocking=True) for t in inputs.tensors()))
            if fed is not None:
                fed.write(moved.token_ids)
            return self._outputs_of(program, moved, pool)
        captured.static.fill(inputs)
        if fed is not None:
            fed.write(captured.static.inputs.token_ids)
        captured.graph.replay()
        record.num_replays += 1
        # A step may replay one size twice, and the next step replays it again.
        logits, highest = captured.outputs
        return logits.clone(), highest.clone()

    def _outputs_of(self, program: str, inputs: ProgramInputs, pool: KVPool) -> Outputs:
        logits = self._programs.run(program, inputs, pool)
        return logits, self.passes.highest(logits)

    def _capture(self, record: CapturedSize) -> None:
        size, pool = record.batch_size, self._kv
        assert pool is not None
        if not self._captured:
            # PyTorch takes a pool's memory back with its last graph, and the pool cannot be used again then.
            self._graph_pool = self._device.new_pool()
        free, start = self._device.free_memory(), self._clock()
        try:
            # Rows of padding: the warm-up writes to the scratch block and to nothing that a sequence holds.
            padding = decode_inputs((), size, self._max_blocks, self._block_size)
            static = StaticInputs(padding, self._device.device)
            graph, outputs = self._device.capture(
                lambda: self._outputs_of(decoder_name(size), static.inputs, pool), self._graph_pool
            )
        except torch.OutOfMemoryError:
            self._device.release()
            record.state = "out_of_memory"
            warnings.warn(
                f"decode batch size {size} is not captured: out of memory with {free} bytes free. It runs uncaptured and"
                " more slowly; give the KV pool less memory (gpu_memory_utilization), or compile fewer sizes",
                stacklevel=3,
            )
            return
        record.state, record.seconds = "captured", self._clock() - start
        record.num_bytes = max(0, free - self._device.free_memory())
        self._captured[size] = _CapturedDecoder(graph, static, outputs)


class QueuedCall:
    """`base.StartedCall` on a device: the call that follows is queued at once, whatever the tokens of this one are."""

    def __init__(
        self,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        begin: Mark,
        end: Mark,
        follow: Callable[[ProgramInputs, int, DrawOptions | None], QueuedCall],
        seconds_past: Callable[[], float],
    ) -> None:
        """Joins what was queued.

        Args:
            logits: of the call, on the device.
            tokens: of the call, on the host once `end` was waited for.
            begin: before the call.
            end: behind its copy of the tokens.
            follow: queues the next call.
            seconds_past: since `end`, once it was waited for.
        """
        self._seconds_past = seconds_past
        self._logits, self._tokens, self._begin, self._end, self._follow = logits, tokens, begin, end, follow
        self._followed: QueuedCall | None = None

    def follow(
        self, inputs: ProgramInputs, num_rows: int, stop_token_ids: Sequence[int], draws: DrawOptions | None = None
    ) -> bool:
        """See `base.StartedCall.follow`; begins at once."""
        self._followed = self._follow(inputs, num_rows, draws)
        return True

    def withdraw(self) -> None:
        """See `base.StartedCall.withdraw`; what was to follow has begun."""

    def finish(self) -> CallResult:
        """See `base.StartedCall.finish`."""
        self._end.wait()
        seconds, late_seconds = self._end.seconds_since(self._begin), self._seconds_past()
        return CallResult(self._logits, self._tokens, seconds, late_seconds, self._followed)
