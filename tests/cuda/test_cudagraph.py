"""Which decoders are captured, when, and what happens where one cannot be; on a device that only pretends."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_decode
from multibatch.artifact import Artifact
from multibatch.backends.base import NeverStarts
from multibatch.backends.cudagraph import CapturedPrograms
from multibatch.backends.eager import EagerPrograms
from multibatch.backends.flat_model import COMPILED_ATTENTION, FlatDecoder
from multibatch.backends.static_inputs import StaticInputs
from multibatch.batch import DecodeRow, ProgramInputs, decode_inputs, prefill_inputs
from multibatch.config import EngineConfig
from multibatch.draws import draw, draw_options
from multibatch.engine import Engine
from multibatch.errors import ConfigError
from multibatch.kv.pool import KVPool
from multibatch.logit_passes import LogitPasses
from multibatch.manifest import KVLayer, KVLayout, decoder_name
from multibatch.sampling_params import SamplingParams
from multibatch.sampling_row import SamplingRow
from multibatch_compile.verify import chunk_of
from tests.cuda.pretended_device import PretendedDevice

BLOCK_SIZE, MAX_BLOCKS, VOCABULARY = 4, 3, 11


class SummingPrograms(NeverStarts):
    """Writes each token into the pool; the logits of a row add up what the pool holds of it. Counts its own calls."""

    passes = LogitPasses()
    own_threads = contextlib.nullcontext

    def __init__(self) -> None:
        self.calls: list[str] = []

    def run(self, program: str, inputs: ProgramInputs, pool: KVPool) -> torch.Tensor:
        self.calls.append(program)
        block, offset = inputs.slot_mapping // BLOCK_SIZE, inputs.slot_mapping % BLOCK_SIZE
        pool.keys[0][block, 0, 0, offset] = inputs.token_ids[0].float()
        held = pool.keys[0][inputs.block_tables.long()][:, :, 0, 0].flatten(1)
        seen = torch.arange(held.shape[1])[None, :] < inputs.seq_lens[:, None]
        return (held * seen).sum(1, keepdim=True) * torch.arange(VOCABULARY)


def new_pool() -> KVPool:
    return KVPool.allocate(KVLayout(BLOCK_SIZE, 1, (KVLayer(1, 1, 1),)), 8, torch.float32)


def decode(tokens: list[int], size: int, position: int = 0) -> ProgramInputs:
    rows = [DecodeRow(token, position, [1 + row]) for row, token in enumerate(tokens)]
    return decode_inputs(rows, size, MAX_BLOCKS, BLOCK_SIZE)


class Bench:
    def __init__(self, sizes: tuple[int, ...] = (1, 4, 2), total: int = 10**9, **options: Any) -> None:
        self.inner, self.device, self.kv = SummingPrograms(), PretendedDevice(total), new_pool()
        self.ticks = iter(range(1000))
        self.programs = CapturedPrograms(
            self.inner,
            self.device,
            sizes,
            max_blocks=MAX_BLOCKS,
            block_size=BLOCK_SIZE,
            clock=lambda: float(next(self.ticks)),
            **options,
        )

    def states(self) -> dict[int, str]:
        return {record.batch_size: record.state for record in self.programs.sizes}

    def run(self, tokens: list[int], size: int, position: int = 0) -> list[float]:
        logits = self.programs.run(decoder_name(size), decode(tokens, size, position), self.kv)
        return logits[: len(tokens), 1].tolist()  # type: ignore[no-any-return]


def test_sizes_are_captured_largest_first_in_one_pool() -> None:
    bench = Bench()
    assert bench.device.captured_rows == []
    bench.programs.bind(bench.kv)
    assert bench.device.captured_rows == [4, 2, 1]
    assert len(bench.device.pools) == 1
    assert bench.states() == {4: "captured", 2: "captured", 1: "captured"}
    assert [record.num_bytes for record in bench.programs.sizes] == [400, 200, 100]
    assert [record.seconds for record in bench.programs.sizes] == [1.0, 1.0, 1.0]
    assert bench.programs.num_bytes == 700


def test_a_replay_reads_this_calls_inputs_and_the_pool() -> None:
    bench = Bench()
    bench.programs.bind(bench.kv)
    assert bench.run([5, 7], 4) == [5.0, 7.0]
    assert bench.run([2, 3], 2, position=1) == [7.0, 10.0]
    assert bench.run([1], 1, position=2) == [8.0]
    counts = {r.batch_size: (r.num_replays, r.num_uncaptured) for r in bench.programs.sizes}
    assert counts == {4: (1, 0), 2: (1, 0), 1: (1, 0)}


def test_static_inputs_are_aligned_and_hold_what_fills_them() -> None:
    static = StaticInputs(decode([1], 3), torch.device("cpu"))
    inputs = decode([5, 6, 7], 3, position=2)
    static.fill(inputs)
    for view, tensor in zip(static.inputs.tensors(), inputs.tensors(), strict=True):
        assert torch.equal(view, tensor)
        assert view.data_ptr() % 16 == 0
    assert len({view.untyped_storage().data_ptr() for view in static.inputs.tensors()}) == 2


def test_a_capture_touches_no_block_but_the_scratch_block() -> None:
    bench = Bench()
    for tensor in (*bench.kv.keys, *bench.kv.values):
        tensor.fill_(3.0)
    bench.programs.bind(bench.kv)
    assert bool((bench.kv.keys[0][1:] == 3.0).all())
    assert bool((bench.kv.keys[0][0, 0, 0] == torch.tensor([0.0, 3.0, 3.0, 3.0])).all())


def test_logits_outlive_the_next_replay() -> None:
    bench = Bench()
    bench.programs.bind(bench.kv)
    first = bench.programs.run(decoder_name(1), decode([5], 1), bench.kv)
    bench.programs.run(decoder_name(1), decode([9], 1), bench.kv)
    assert float(first[0, 1]) == 5.0


def test_prefill_runs_as_it_is() -> None:
    bench = Bench()
    bench.programs.bind(bench.kv)
    inputs = prefill_inputs([chunk_of([3, 4], [1])], 4, 1, MAX_BLOCKS, BLOCK_SIZE)
    before = len(bench.inner.calls)
    assert float(bench.programs.run("prefill_4", inputs, bench.kv)[0, 1]) == 7.0
    assert bench.inner.calls[before:] == ["prefill_4"]


def test_before_bind_and_on_another_pool_the_program_itself_runs_and_is_counted() -> None:
    bench = Bench()
    assert bench.run([5], 1) == [5.0]
    bench.programs.bind(bench.kv)
    other = new_pool()
    assert float(bench.programs.run(decoder_name(1), decode([6], 1), other)[0, 1]) == 6.0
    assert float(other.keys[0].sum()) == 6.0
    one = bench.programs.sizes[-1]
    assert (one.num_replays, one.num_uncaptured) == (0, 2)


def test_bound_again_graphs_hold_the_new_pool_and_the_old_memory_is_back() -> None:
    bench = Bench()
    bench.programs.bind(new_pool())
    bench.programs.bind(bench.kv)
    assert bench.device.free_memory() == 10**9 - 700
    assert bench.run([5], 1) == [5.0]
    assert float(bench.kv.keys[0][1].sum()) == 5.0
    assert len(bench.device.pools) == 2  # PyTorch's pool went with its last graph


def test_lazily_the_first_call_runs_the_program_and_the_second_captures_it() -> None:
    bench = Bench(capture="lazy")
    bench.programs.bind(bench.kv)
    assert bench.device.captured_rows == []
    assert bench.run([5, 7], 2) == [5.0, 7.0]
    assert bench.states() == {4: "pending", 2: "pending", 1: "pending"}
    assert bench.run([2, 3], 2, position=1) == [7.0, 10.0]
    assert bench.device.captured_rows == [2]
    assert bench.states() == {4: "pending", 2: "captured", 1: "pending"}
    record = bench.programs.sizes[1]
    assert (record.num_uncaptured, record.num_replays) == (1, 1)


def test_in_idle_time_used_sizes_come_first_and_then_the_largest() -> None:
    bench = Bench(capture="lazy", sizes=(1, 2, 4, 8))
    assert bench.programs.capture_next() is None  # no pool yet
    bench.programs.bind(bench.kv)
    bench.run([5, 7], 2)
    order = []
    while (record := bench.programs.capture_next()) is not None:
        order.append(record.batch_size)
    assert order == [2, 8, 4, 1] == bench.device.captured_rows


def test_out_of_memory_drops_the_size_by_name_and_goes_on() -> None:
    bench = Bench(total=350)
    with pytest.warns(
        UserWarning, match=r"batch size 4 is not captured: out of memory with 350 bytes free\..*uncaptured"
    ):
        bench.programs.bind(bench.kv)
    assert bench.states() == {4: "out_of_memory", 2: "captured", 1: "captured"}
    assert bench.device.free_memory() == 50
    assert bench.device.num_releases == 2  # before the first capture, and behind the one that failed
    # It answers all the same, is not tried again at every call, and says how often.
    tried = list(bench.device.captured_rows)
    assert bench.run([5, 7], 4) == [5.0, 7.0]
    assert bench.run([1, 1], 4, position=1) == [6.0, 8.0]
    assert bench.device.captured_rows == tried
    assert bench.programs.sizes[0].num_uncaptured == 2
    # What it left behind is in nobody's way.
    assert bench.run([2], 1, position=2) == [8.0]


def test_out_of_memory_while_serving_lazily_answers_the_call() -> None:
    bench = Bench(total=100, capture="lazy")
    bench.programs.bind(bench.kv)
    bench.run([5, 7], 2)
    with pytest.warns(UserWarning, match="batch size 2 is not captured"):
        assert bench.run([1, 1], 2, position=1) == [6.0, 8.0]
    assert bench.states()[2] == "out_of_memory"


def test_another_error_of_a_capture_is_not_swallowed() -> None:
    bench = Bench()

    def fails(*arguments: Any) -> torch.Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    bench.inner.run = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="not permitted"):
        bench.programs.bind(bench.kv)


def test_a_size_is_dropped_and_added_while_serving() -> None:
    bench = Bench(total=700)
    bench.programs.bind(bench.kv)
    assert bench.run([5], 4) == [5.0]
    bench.programs.drop(4)
    assert bench.device.free_memory() == 400
    assert bench.programs.num_bytes == 300
    assert bench.run([6], 4, position=1) == [11.0]
    assert bench.states()[4] == "dropped"
    assert bench.programs.add(3).state == "captured"
    assert bench.run([7], 3, position=2) == [18.0]
    with pytest.warns(UserWarning, match="batch size 4"):
        assert bench.programs.add(4).state == "out_of_memory"
    bench.programs.drop(3)
    record = bench.programs.add(4)
    assert (record.state, record.num_replays, record.num_uncaptured) == ("captured", 1, 1)
    assert [r.batch_size for r in bench.programs.sizes] == [4, 3, 2, 1]


def test_a_dropped_size_stays_dropped_when_bound_again() -> None:
    bench = Bench()
    bench.programs.drop(2)
    bench.programs.bind(bench.kv)
    assert bench.states() == {4: "captured", 2: "dropped", 1: "captured"}


def test_what_cannot_be_added_or_dropped_is_refused_by_name() -> None:
    bench = Bench()
    bench.programs.bind(bench.kv)
    with pytest.raises(ConfigError, match="size 2 is captured already"):
        bench.programs.add(2)
    with pytest.raises(ConfigError, match="size 5 is not there to be dropped; allowed: 4, 2, 1"):
        bench.programs.drop(5)
    with pytest.raises(ConfigError, match="capture is 'sometimes'; allowed: eager, lazy"):
        Bench(capture="sometimes")


@pytest.mark.parametrize("name", [*gpu_decode.ARCHITECTURES, "Qwen2"])
def test_a_models_decode_step_waits_for_no_value(name: str) -> None:
    # Tensors without values: whatever the host asked of one would fail here, as it would in a capture.
    meta = torch.device("meta")
    model = gpu_decode.random_model(
        name, gpu_decode.TINY | gpu_decode.ARCHITECTURES.get(name, {}), torch.bfloat16, meta
    )
    pool = KVPool.allocate(gpu_decode.layout_of(model.config), 8, torch.bfloat16, "meta")
    inputs = gpu_decode.on_device(decode([5, 6], 4), meta)
    logits = EagerPrograms(FlatDecoder(model, COMPILED_ATTENTION)).run("", inputs, pool)
    assert logits.shape == (4, gpu_decode.TINY["vocab_size"])


@pytest.mark.parametrize("is_bound", [True, False])
def test_a_call_that_follows_has_its_tokens_from_the_device(is_bound: bool) -> None:
    bench = Bench()
    if is_bound:
        bench.programs.bind(bench.kv)
    call = bench.programs.start(decoder_name(2), decode([5, 7], 2), bench.kv)
    assert call.follow(decode([0, 0], 2, position=1), 2, [VOCABULARY - 1])  # nobody on the host knows of that token
    call.withdraw()
    result = call.finish()
    assert result.tokens.tolist() == [VOCABULARY - 1] * 2
    assert result.logits[:, 1].tolist() == [5.0, 7.0]  # though the next call ran already
    assert result.seconds == 1.0
    assert result.followed is not None
    assert result.followed.finish().logits[:, 1].tolist() == [5.0 + VOCABULARY - 1, 7.0 + VOCABULARY - 1]
    alone = bench.programs.start(decoder_name(1), decode([3], 1), bench.kv).finish()
    assert (alone.logits[0, 1].item(), alone.followed) == (3.0, None)
    bench.programs.settle()


def test_a_row_without_a_token_is_followed_by_any(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.programs.bind(bench.kv)
    run = bench.inner.run

    def spoilt(program: str, inputs: ProgramInputs, pool: KVPool) -> torch.Tensor:
        logits = run(program, inputs, pool)
        logits[0] += torch.where(inputs.token_ids[0, 0] == 9, torch.nan, 0.0)
        return logits

    monkeypatch.setattr(bench.inner, "run", spoilt)
    call = bench.programs.start(decoder_name(2), decode([9, 7], 2), bench.kv)
    call.follow(decode([0, 0], 2, position=1), 2, [])
    result = call.finish()
    assert result.tokens.tolist() == [-1, VOCABULARY - 1]
    assert result.followed is not None
    assert result.followed.finish().logits[:, 1].tolist() == [9.0 + 0, 7.0 + VOCABULARY - 1]


def test_tokens_are_drawn_on_the_device() -> None:
    bench = Bench()
    bench.programs.bind(bench.kv)
    rows = [SamplingRow(params=SamplingParams(temperature=2.0), seed=s, position=s) for s in range(2)]
    draws = draw_options(rows, VOCABULARY)
    seen = set()
    for position in range(BLOCK_SIZE):
        result = bench.programs.start(decoder_name(4), decode([1, 1], 4, position), bench.kv, draws).finish()
        assert result.tokens.tolist() == draw(result.logits[:2], rows, LogitPasses())
        seen |= set(result.tokens.tolist())
    assert len(seen) > 1


@pytest.mark.parametrize("capture", ["eager", "lazy"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_engine_over_captured_decoders_answers_the_same(
    eager_artifact: Path, capture: str, temperature: float
) -> None:
    artifact = Artifact.open(eager_artifact)
    manifest, config = artifact.manifest, EngineConfig(selector_policy="nearest")
    inner, device = EagerPrograms.load(artifact), PretendedDevice()
    captured = CapturedPrograms(
        inner,
        device,
        manifest.decoder_batch_sizes,
        max_blocks=-(-manifest.max_seq_len // manifest.kv.block_size),
        block_size=manifest.kv.block_size,
        capture=capture,  # type: ignore[arg-type]
    )
    engine = Engine(artifact, config, captured)
    captured.bind(engine.pool)
    answers = [tokens_of(engine, temperature), tokens_of(Engine(artifact, config, inner), temperature)]
    assert answers[0] == answers[1]
    assert not engine.is_ahead
    assert engine.kv_cache_usage == 0
    assert all(record.num_replays > 0 for record in captured.sizes)
    assert sum(record.num_uncaptured for record in captured.sizes) == (0 if capture == "eager" else 2)


def tokens_of(engine: Engine, temperature: float) -> dict[str, list[int]]:
    # Three rows run on size 4, and the last to end runs alone on size 1. One of them may end by a token.
    for index, length in enumerate((4, 6, 12)):
        params = SamplingParams(
            temperature=temperature, max_tokens=length, ignore_eos=index != 1, detokenize=False, top_p=0.9
        )
        engine.add_request(str(index), list(range(5 + index, 25)), params)
    return {name: list(output.outputs[0].token_ids) for name, output in engine.run_all().items()}
