"""`AsyncEngine`: the same answers as `LLM`, whatever clients, steps and the thread do; nothing is lost without a name."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from multibatch import LLM, AsyncEngine, SamplingParams
from multibatch.errors import ConfigError, EngineDeadError, QueueFullError, RequestError, StepError
from multibatch.request import RequestOutput
from multibatch.sampling_params import RequestOutputKind
from tests.e2e.pretended_programs import PretendedPrograms, continuation, pretended_engine

TEN = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, detokenize=False)
LONG = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True, detokenize=False)
LIMIT_S = 60.0


@pytest.fixture(autouse=True, params=[False, True], ids=["in-turn", "ahead"])
def steps_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps run one after the other, or while the outputs of the one before are handed out."""
    monkeypatch.setattr(PretendedPrograms, "can_start", request.param)


class Served:
    """An engine without a model, its programs and what its steps wait for."""

    def __init__(
        self, artifact: Path, *, max_queued_requests: int | None = None, step_s: float = 0.0, **options: Any
    ) -> None:
        self.engine, self.programs = pretended_engine(artifact, **options)
        self.step_s = step_s
        self.gate = threading.Event()
        self.gate.set()
        self.programs.on_call = self.wait
        self.served = AsyncEngine.from_engine(self.engine, max_queued_requests=max_queued_requests)

    def wait(self) -> None:
        assert self.gate.wait(LIMIT_S)
        time.sleep(self.step_s)

    def expected(self, prompt: list[int], num_tokens: int) -> list[int]:
        return continuation(prompt, num_tokens, self.programs.vocabulary)

    async def tokens(self, prompt: list[int], name: str, params: SamplingParams = TEN) -> list[int]:
        return (await last(self.served.generate(prompt, params, name))).outputs[0].token_ids

    async def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < end
            await asyncio.sleep(0.001)

    async def is_empty(self) -> None:
        await self.until(lambda: self.served.num_unfinished == 0 and not self.engine.has_unfinished)
        self.engine.scheduler.check_integrity()
        assert self.engine.kv_cache_usage == 0


async def last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    found = None
    async for output in outputs:
        found = output
    assert found is not None
    assert found.finished
    return found


@asynccontextmanager
async def serving(artifact: Path, **options: Any) -> AsyncIterator[Served]:
    it = Served(artifact, **options)
    try:
        yield it
    finally:
        it.gate.set()
        it.served.shutdown()
        await it.served.wait_closed()


def run(main: Coroutine[Any, Any, None], limit_s: float = LIMIT_S) -> None:
    asyncio.run(asyncio.wait_for(main, limit_s))


@pytest.mark.parametrize("artifact", ["eager_artifact", "demo_artifact"])
def test_many_at_once_get_what_each_gets_from_llm(artifact: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(artifact)
    rng = random.Random(0)
    prompts = [[rng.randrange(16, 300) for _ in range(rng.randrange(1, 40))] for _ in range(24)]
    kinds = list(RequestOutputKind)
    params = [
        SamplingParams(
            temperature=[0.0, 0.9][i % 2],
            seed=i,
            n=1 + 2 * (i % 4 == 3),
            max_tokens=rng.randrange(1, 24),
            ignore_eos=True,
            output_kind=kinds[i % 3],
        )
        for i in range(24)
    ]
    llm = LLM(folder)
    expected = [llm.generate(p, s, use_tqdm=False)[0] for p, s in zip(prompts, params, strict=True)]

    async def one(engine: AsyncEngine, i: int) -> list[tuple[list[int], str]]:
        found: list[tuple[list[int], str]] = [([], "")] * params[i].n
        async for output in engine.generate(prompts[i], params[i], str(i)):
            for c in output.outputs:
                tokens, text = found[c.index] if params[i].output_kind is RequestOutputKind.DELTA else ([], "")
                found[c.index] = (tokens + c.token_ids, text + c.text)
        return found

    async def main() -> None:
        async with AsyncEngine(folder) as engine:
            results = await asyncio.gather(*(one(engine, i) for i in range(24)))
        for found, output in zip(results, expected, strict=True):
            assert found == [(c.token_ids, c.text) for c in output.outputs]

    run(main())


def test_prompt_forms(eager_artifact: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)

    async def main() -> None:
        async with AsyncEngine(eager_artifact) as engine:
            ids = engine.tokenizer.encode("hello")
            assert (await engine.get_tokenizer())("hello")["input_ids"] == ids
            forms: list[Any] = ["hello", {"prompt": "hello", "cache_salt": "a"}, ids, {"prompt_token_ids": ids}]
            outputs = [await last(engine.generate(form, params, str(i))) for i, form in enumerate(forms)]
            assert [o.prompt for o in outputs] == ["hello", "hello", None, None]
            assert len({o.outputs[0].text for o in outputs}) == 1
            for wrong in ("", [], {"text": "x"}, [1.5], [5] * 128, [10**6]):
                with pytest.raises(RequestError):
                    await last(engine.generate(wrong, params, "wrong"))

    run(main())


def test_what_is_wrong_is_raised_where_it_was_asked(eager_artifact: Path) -> None:
    async def main() -> None:
        async with serving(eager_artifact) as it:
            for arguments in ([[5], {"max_tokens": 3}, "a"], [[5], TEN, ""], [[5], TEN, 7]):
                with pytest.raises(RequestError, match=r"allowed: (SamplingParams|a string)"):
                    await last(it.served.generate(*arguments))
            with pytest.raises(RequestError, match="priority is '1'"):
                await last(it.served.generate([5], TEN, "a", priority="1"))  # type: ignore[arg-type]
            with pytest.raises(RequestError, match="first come, first served"):
                await last(it.served.generate([5], TEN, "a", priority=1))
            it.gate.clear()
            first = asyncio.create_task(it.tokens([5], "a"))
            await it.until(lambda: it.served.num_unfinished)
            with pytest.raises(RequestError, match="request 'a' is being served already"):
                await it.tokens([5], "a")
            it.gate.set()
            assert await first == it.expected([5], 10)
            assert await it.tokens([5], "a") == it.expected([5], 10)
            await it.is_empty()

    run(main())
    with pytest.raises(ConfigError, match="max_queued_requests is -1"):
        AsyncEngine(eager_artifact, max_queued_requests=-1)
    for unknown in ("speculative", "usual_batched_tokens"):
        with pytest.raises(ConfigError, match=f"unknown option {unknown}"):
            AsyncEngine(eager_artifact, **{unknown: 1})


def test_a_consumer_that_goes_away_ends_its_request(eager_artifact: Path) -> None:
    async def by_break(it: Served) -> None:
        async for _ in it.served.generate([5, 6], LONG, "a"):
            break

    async def by_aclose(it: Served) -> None:
        outputs = it.served.generate([5, 6], LONG, "a")
        await anext(outputs)
        await outputs.aclose()

    async def by_cancelling_the_task(it: Served) -> None:
        task = asyncio.create_task(it.tokens([5, 6], "a", LONG))
        await it.until(lambda: it.programs.num_calls > 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def by_a_timeout_before_the_first_token(it: Served) -> None:
        it.gate.clear()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(it.tokens([5, 6], "a", LONG), 0.05)
        it.gate.set()

    async def by_forgetting(it: Served) -> None:
        outputs = it.served.generate([5, 6], LONG, "a")
        await anext(outputs)
        del outputs
        gc.collect()

    async def main() -> None:
        async with serving(eager_artifact, step_s=0.002, num_kv_blocks=8) as it:
            ways = (by_break, by_aclose, by_cancelling_the_task, by_a_timeout_before_the_first_token, by_forgetting)
            for way in ways:
                it.programs.num_calls = 0
                await way(it)
                await it.is_empty()
                assert it.programs.num_calls < 100
            assert await it.tokens([5, 6], "a") == it.expected([5, 6], 10)

    run(main())


def test_a_consumer_whose_event_loop_is_gone_ends_its_request(eager_artifact: Path) -> None:
    it = Served(eager_artifact, step_s=0.002)
    loop = asyncio.new_event_loop()
    outputs = it.served.generate([5], LONG, "a")
    loop.run_until_complete(anext(outputs))
    loop.close()

    async def main() -> None:
        await it.is_empty()
        assert it.programs.num_calls < 100
        it.served.shutdown()
        await it.served.wait_closed()

    run(main())


def test_abort_by_name(eager_artifact: Path) -> None:
    async def main() -> None:
        async with serving(eager_artifact, step_s=0.002, max_num_seqs=2) as it:
            names = ["a", "b", "c", "d"]
            tasks = {n: asyncio.create_task(last(it.served.generate([5], LONG, n))) for n in names}
            await it.until(lambda: it.programs.num_calls > 5)
            await it.served.abort(["c", "unknown"])  # before the place of "a" is free
            await it.served.abort("a")
            done = {name: (await task).outputs[0] for name, task in tasks.items()}
            assert [done[n].finish_reason for n in names] == ["abort", "length", "abort", "length"]
            assert 0 < len(done["a"].token_ids) < 100
            assert done["a"].token_ids == it.expected([5], 100)[: len(done["a"].token_ids)]
            assert done["c"].token_ids == []
            assert done["b"].token_ids == done["d"].token_ids == it.expected([5], 100)
            await it.is_empty()

    run(main())


def test_no_more_wait_than_may(eager_artifact: Path) -> None:
    async def main() -> None:
        async with serving(eager_artifact, max_num_seqs=2, max_queued_requests=3) as it:
            it.gate.clear()
            tasks = [asyncio.create_task(it.tokens([5], str(i))) for i in range(5)]
            await it.until(lambda: it.served.num_unfinished == 5)
            with pytest.raises(QueueFullError, match=r"allowed: 5, .* Try again later") as caught:
                await it.tokens([5], "5")
            assert (caught.value.num_unfinished, caught.value.limit) == (5, 5)
            tasks[4].cancel()
            it.gate.set()
            await asyncio.wait(tasks)
            assert [t.result() for t in tasks[:4]] == [it.expected([5], 10)] * 4
            assert await it.tokens([5], "5") == it.expected([5], 10)
            with pytest.raises(QueueFullError, match="6 sequences"):
                await it.tokens([5], "6", SamplingParams(n=6, max_tokens=2, detokenize=False))
            await it.is_empty()

    run(main())


def test_a_failed_step_fails_its_own_requests_and_no_other(
    eager_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with serving(eager_artifact, max_num_seqs=2) as it:
            inner, fails = it.engine.compute, [False]

            def sometimes(step: Any, launch: Any) -> Any:
                if fails[0] and step.decode:
                    fails[0] = False
                    raise RuntimeError("bad memory")
                return inner(step, launch)

            monkeypatch.setattr(it.engine, "compute", sometimes)
            it.gate.clear()
            names = ["a", "b", "c#0", "c#1"]
            tasks = [asyncio.create_task(it.tokens([5, i], n)) for i, n in enumerate(names)]
            await it.until(lambda: it.served.num_unfinished == 4)
            fails[0] = True
            it.gate.set()
            await asyncio.wait(tasks)
            for task in tasks[:2]:
                error = task.exception()
                assert isinstance(error, StepError)
                assert error.request_ids == ("a", "b")
                assert "bad memory" in str(error)
                assert isinstance(error.__cause__, RuntimeError)
            assert tasks[0].exception() is not tasks[1].exception()
            assert [t.result() for t in tasks[2:]] == [it.expected([5, i], 10) for i in (2, 3)]
            await it.served.check_health()
            assert await it.tokens([5], "a") == it.expected([5], 10)
            await it.is_empty()

    run(main())


def test_a_failed_step_ends_every_completion_of_a_request(
    eager_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with serving(eager_artifact, max_num_seqs=2) as it:
            inner = it.engine.compute
            several = SamplingParams(n=3, max_tokens=20, ignore_eos=True, detokenize=False)

            def fails(step: Any, launch: Any) -> Any:
                if len(step.decode) == 2:
                    raise RuntimeError("bad memory")
                return inner(step, launch)

            with monkeypatch.context() as patch:
                patch.setattr(it.engine, "compute", fails)
                with pytest.raises(StepError) as caught:
                    await last(it.served.generate([5], several, "a"))
                assert caught.value.request_ids == ("a",)
            await it.is_empty()
            assert it.programs.num_calls < 10
            assert len((await last(it.served.generate([5], several, "a"))).outputs) == 3

    run(main())


def test_a_thread_that_dies_tells_everyone(eager_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving(eager_artifact, max_num_seqs=2) as it:
            it.gate.clear()
            tasks = [asyncio.create_task(it.tokens([5], n)) for n in "abc"]
            await it.until(lambda: it.served.num_unfinished == 3)
            monkeypatch.setattr(it.engine, "compute", lambda *_: {}["no such key"])
            pausing = asyncio.create_task(it.served.pause_generation(mode="wait"))
            it.gate.set()
            await asyncio.wait([*tasks, pausing])
            for name, task in zip("abc", tasks, strict=True):
                error = task.exception()
                assert isinstance(error, EngineDeadError)
                assert error.request_id == name
                assert f"request {name!r}" in str(error)
                assert "KeyError: 'no such key'" in str(error)
            assert isinstance(pausing.exception(), EngineDeadError)
            with pytest.raises(EngineDeadError, match="died of KeyError") as caught:
                await it.served.check_health()
            assert isinstance(caught.value.__cause__, KeyError)
            with pytest.raises(EngineDeadError, match="request 'd'"):
                await it.tokens([5], "d")
            with pytest.raises(EngineDeadError):
                await it.served.resume_generation()
            await it.served.abort("a")
            assert it.served.num_unfinished == 0

    run(main())


def test_pause_keeps_waits_or_aborts(eager_artifact: Path) -> None:
    async def main() -> None:
        async with serving(eager_artifact, step_s=0.001, max_num_seqs=2) as it:
            for mode in ("keep", "wait", "abort"):
                it.programs.num_calls = 0
                before = [asyncio.create_task(last(it.served.generate([5], LONG, n))) for n in "abc"]
                await it.until(lambda: it.programs.num_calls > 5)
                assert not await it.served.is_paused()
                await it.served.pause_generation(mode=mode)  # type: ignore[arg-type]
                assert await it.served.is_paused()
                calls = it.programs.num_calls
                meanwhile = [asyncio.create_task(last(it.served.generate([6], TEN, n))) for n in "de"]
                await asyncio.sleep(0.05)
                assert it.programs.num_calls == calls
                assert it.served.num_unfinished == (5 if mode == "keep" else 2)
                await it.served.abort("e")
                assert (await meanwhile[1]).outputs[0].finish_reason == "abort"
                await it.served.resume_generation()
                reasons = [(await task).outputs[0].finish_reason for task in before]
                assert reasons == ["abort" if mode == "abort" else "length"] * 3
                assert (await meanwhile[0]).outputs[0].token_ids == it.expected([6], 10)
                await it.is_empty()
            with pytest.raises(ConfigError, match="allowed: abort, wait, keep"):
                await it.served.pause_generation(mode="stop")  # type: ignore[arg-type]

    run(main())


def test_resuming_ends_a_pause_that_still_waits(eager_artifact: Path) -> None:
    async def main() -> None:
        async with serving(eager_artifact) as it:
            it.gate.clear()
            task = asyncio.create_task(it.tokens([5], "a"))
            await it.until(lambda: it.programs.num_calls == 1)
            pausing = asyncio.create_task(it.served.pause_generation(mode="wait"))
            given_up = asyncio.create_task(it.served.pause_generation(mode="wait"))
            await asyncio.sleep(0.01)
            given_up.cancel()
            resuming = asyncio.create_task(it.served.resume_generation())
            await asyncio.sleep(0.01)
            it.gate.set()
            await asyncio.wait([pausing, resuming, given_up])
            assert await task == it.expected([5], 10)
            assert await it.served.reset_prefix_cache()
            await it.served.check_health()

    run(main())


def test_shutdown_ends_running_requests_by_name(eager_artifact: Path) -> None:
    async def main() -> None:
        async with serving(eager_artifact, max_num_seqs=2) as it:
            it.gate.clear()
            tasks = [asyncio.create_task(it.tokens([5], n, LONG)) for n in "abc"]
            await it.until(lambda: it.served.num_unfinished == 3 and it.programs.num_calls)
            it.served.shutdown()
            with pytest.raises(EngineDeadError, match="'d' is not served: the engine was shut down"):
                await it.tokens([5], "d")
            it.gate.set()
            await asyncio.wait(tasks)
            assert [str(task.exception()).split(" is not")[0] for task in tasks] == [f"request {n!r}" for n in "abc"]
            await it.served.wait_closed()
            it.served.shutdown()
            with pytest.raises(EngineDeadError, match=r"^the engine was shut down"):
                await it.served.check_health()
            await it.is_empty()

    run(main())


def test_an_engine_that_is_forgotten_ends_its_thread(eager_artifact: Path) -> None:
    it = Served(eager_artifact)
    thread = it.served._thread._thread
    assert thread.is_alive()
    del it.served
    gc.collect()
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def test_a_slow_consumer_loses_nothing_and_slows_nobody(eager_artifact: Path) -> None:
    async def slow(it: Served, name: str, kind: RequestOutputKind) -> tuple[list[int], int]:
        params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True, detokenize=False, output_kind=kind)
        tokens, num_outputs = [], 0
        async for output in it.served.generate([5], params, name):
            found = output.outputs[0].token_ids
            tokens = tokens + found if kind is RequestOutputKind.DELTA else found
            num_outputs += 1
            await asyncio.sleep(0.3)
        return tokens, num_outputs

    async def main() -> None:
        async with serving(eager_artifact, step_s=0.001) as it:
            behind = [
                asyncio.create_task(slow(it, name, kind))
                for name, kind in zip("ab", (RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE), strict=True)
            ]
            assert await it.tokens([6], "c") == it.expected([6], 10)
            assert not any(task.done() for task in behind)
            for task in behind:
                tokens, num_outputs = await task
                assert tokens == it.expected([5], 100)
                assert num_outputs < 50

    run(main())


def test_while_idle_nothing_runs(eager_artifact: Path) -> None:
    async def main() -> None:
        async with serving(eager_artifact) as it:
            await it.tokens([5], "a")
            calls, used = it.programs.num_calls, time.process_time()
            await asyncio.sleep(0.5)
            assert it.programs.num_calls == calls
            assert time.process_time() - used < 0.25

    run(main())


class Soak:
    """10,000 requests from impatient clients through an engine whose steps fail and stall, and whose pool is too small."""

    num_requests = 10_000
    num_clients = 64

    def __init__(self, it: Served, seed: int) -> None:
        self.it = it
        self.faults = random.Random(seed)
        self.rng = random.Random(seed + 1)
        self.ended: Counter[str] = Counter()
        self.refused = 0
        self.numbers = iter(range(self.num_requests))
        it.programs.on_call = self.disturb

    def disturb(self) -> None:
        chance = self.faults.random()
        if chance < 0.01:
            raise RuntimeError("injected")
        if chance < 0.012:
            time.sleep(0.01)

    async def client(self) -> None:
        for number in self.numbers:
            self.ended[await self.request(str(number))] += 1

    async def request(self, name: str) -> str:
        rng = self.rng
        prompt = [rng.randrange(16, 300) for _ in range(rng.choice((1, 3, 8, 20)))]
        num_tokens = rng.choice((1, 2, 4, 8) * 5 + (40,))
        kind = rng.choice(list(RequestOutputKind))
        params = SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, output_kind=kind
        )
        expected = self.it.expected(prompt, num_tokens)
        will = rng.choice(("stay",) * 16 + ("leave", "abort", "time out", "dawdle"))
        while True:
            try:
                async with asyncio.timeout(rng.random() * 0.02 if will == "time out" else LIMIT_S):
                    return await self.consume(name, prompt, params, expected, will)
            except QueueFullError:
                self.refused += 1
                await asyncio.sleep(0.001)
            except StepError as error:
                return "failed" if name in error.request_ids else "failed for others"
            except TimeoutError:
                assert will == "time out"
                return "timed out"

    async def consume(
        self, name: str, prompt: list[int], params: SamplingParams, expected: list[int], will: str
    ) -> str:
        tokens: list[int] = []
        async for output in self.it.served.generate(prompt, params, name):
            (completion,) = output.outputs
            tokens = (
                tokens + completion.token_ids if params.output_kind is RequestOutputKind.DELTA else completion.token_ids
            )
            assert tokens == expected[: len(tokens)]
            if output.finished:
                if completion.finish_reason == "length":
                    assert tokens == expected
                return str(completion.finish_reason)
            if will == "leave":
                return "left"
            if will == "abort":
                await self.it.served.abort(name)
            if will == "dawdle":
                await asyncio.sleep(0.005)
        raise AssertionError(f"request {name} ended without a word")


def test_ten_thousand_requests_and_none_is_lost(eager_artifact: Path) -> None:
    async def main() -> None:
        async with serving(eager_artifact, num_kv_blocks=4, max_queued_requests=50) as it:
            soak = Soak(it, seed=11)
            await asyncio.gather(*(soak.client() for _ in range(soak.num_clients)))
            assert soak.ended.total() == soak.num_requests
            assert set(soak.ended) <= {"length", "failed", "timed out", "left", "abort"}
            assert soak.ended["length"] > soak.num_requests / 2
            assert all(soak.ended[end] > 10 for end in ("failed", "timed out", "left", "abort"))
            assert soak.refused > 0
            assert it.engine.stats.num_preemptions > 100
            await it.is_empty()
            await it.served.check_health()

    run(main(), limit_s=5 * LIMIT_S)
