"""The next step runs while the outputs of the one before are handed out: the same tokens, and nothing lost or left."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from multibatch import LLM, SamplingParams, ops
from multibatch.artifact import Artifact
from multibatch.backends.base import CallResult
from multibatch.config import EngineConfig
from multibatch.engine import Engine
from multibatch.errors import ConfigError, RequestError, StepError
from multibatch.request import RequestOutput
from multibatch.sampling_params import RequestOutputKind
from multibatch.scheduled_step import ScheduledStep
from multibatch.structured_outputs import StructuredOutputsParams
from tests.e2e.pretended_programs import PretendedCall, PretendedPrograms, continuation, pretended_engine

LONG = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, detokenize=False)


@pytest.fixture
def engine(eager_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(PretendedPrograms, "can_start", True)
    return pretended_engine(eager_artifact)[0]


def expected(engine: Engine, prompt: list[int], num_tokens: int) -> list[int]:
    return continuation(prompt, num_tokens, engine.manifest.model.vocab_size)


def assert_idle(engine: Engine) -> None:
    assert not engine.has_unfinished
    assert not engine.is_ahead
    assert engine.kv_cache_usage == 0
    engine.scheduler.check_integrity()


def tokens_of(outputs: list[RequestOutput]) -> dict[str, list[int]]:
    return {output.request_id: output.outputs[0].token_ids for output in outputs}


def varied() -> tuple[list[list[int]], list[SamplingParams]]:
    """Requests that end, draw and ask in every way there is."""
    rng = random.Random(5)
    prompts = [[rng.randrange(16, 300) for _ in range(rng.randrange(1, 60))] for _ in range(24)]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0, "ignore_eos": True},
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 1.5, "top_k": 20, "stop": ["1", "e"]},
        {"temperature": 0.9, "n": 2, "repetition_penalty": 1.2},
        {"temperature": 0.0, "prompt_logprobs": 1},
        {"temperature": 1.0, "structured_outputs": StructuredOutputsParams(choice=["yes", "no", "maybe"])},
        {"temperature": 1.0, "stop_token_ids": list(range(100, 200)), "min_tokens": 3},
        {"temperature": 1.0, "bad_words": ["the"], "min_p": 0.02},
    ]
    params = [SamplingParams(seed=i, max_tokens=rng.randrange(1, 30), **kinds[i % 8]) for i in range(24)]
    return prompts, params


def told(outputs: list[RequestOutput]) -> list[Any]:
    """All that a request is told, but when."""
    return [
        (o.prompt_logprobs, [(c.token_ids, c.text, c.finish_reason, c.stop_reason, c.logprobs) for c in o.outputs])
        for o in outputs
    ]


@pytest.mark.parametrize("options", [{}, {"num_kv_blocks": 8}, {"max_num_seqs": 3, "enable_prefix_caching": False}])
def test_every_kind_of_request_is_told_the_same(demo_artifact: Path, options: dict[str, Any]) -> None:
    prompts, params = varied()
    found = []
    for ahead in (False, True):
        llm = LLM(demo_artifact, async_scheduling=ahead, num_threads=2, **options)
        found.append(told(llm.generate(prompts, params, use_tqdm=False)))
        found.append(told(llm.generate(prompts, params, use_tqdm=False)))
        assert_idle(llm.engine)
    assert found[0] == found[2]
    assert found[1] == found[3]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_prompt_in_pieces_tells_its_logprobs_beside_plain_rows(demo_artifact: Path, ahead: bool) -> None:
    engine = LLM(demo_artifact, async_scheduling=ahead, num_threads=2).engine
    alone = LLM(demo_artifact, async_scheduling=False, num_threads=2).engine
    prompt = [16 + i for i in range(100)]  # more than a step takes
    asking = SamplingParams(temperature=0.0, max_tokens=5, prompt_logprobs=0, detokenize=False)
    engine.add_request("plain", [50], LONG)
    for _ in range(3):
        engine.step()
    engine.add_request("asking", prompt, asking)
    alone.add_request("asking", prompt, asking)
    found, expected = engine.run_all(), alone.run_all()["asking"]
    assert told([found["asking"]]) == told([expected])
    assert expected.prompt_logprobs is not None
    assert len(expected.prompt_logprobs) == 100
    assert len(found["plain"].outputs[0].token_ids) == 40
    assert_idle(engine)


def test_a_step_may_be_waited_for_before_it_is_told(demo_artifact: Path) -> None:
    engine = LLM(demo_artifact, num_threads=2).engine
    found = []
    for waits in (True, False):
        engine.add_request("a", [50, 51], LONG)
        while engine.has_unfinished:
            found += engine.step()
            if waits:
                engine.wait_ahead()
                engine.wait_ahead()
        assert_idle(engine)
    half = len(found) // 2
    assert [o.outputs[0].token_ids for o in found[:half]] == [o.outputs[0].token_ids for o in found[half:]]


def test_a_pause_is_none_of_a_steps_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, found = [100.0], []
    monkeypatch.setattr("multibatch.engine.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(engine.scheduler, "step_done", lambda _, ms: found.append(ms))
    engine.add_request("a", [5], LONG)
    engine.step()
    engine.wait_ahead()
    clock[0] += 1000
    engine.step()
    clock[0] += 1  # the step runs
    engine.step()
    assert found[1] < 500
    assert found[2] > 500


def test_an_interrupted_launch_leaves_nothing_behind(demo_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(demo_artifact, num_threads=2)
    expected = told(llm.generate([50, 51], LONG, use_tqdm=False))
    inner, calls = llm.engine.runner.start, 0

    def interrupted(*step: Any) -> Any:
        nonlocal calls
        calls += 1
        inner(*step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([50, 51], LONG, use_tqdm=False)
    assert calls == 1
    assert_idle(llm.engine)
    assert told(llm.generate([50, 51], LONG, use_tqdm=False)) == expected


def test_an_interrupt_behind_a_step_does_not_shift_the_tokens(
    demo_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(demo_artifact, num_threads=2)
    expected = told(llm.generate([50, 51], LONG, use_tqdm=False))
    engine, finish = llm.engine, llm.engine.runner._finish

    def interrupted(started: Any) -> Any:
        finish(started)
        raise KeyboardInterrupt

    for _ in range(20):
        engine.add_request("a", [50, 51], LONG)
        for _ in range(3):
            engine.step()
        with monkeypatch.context() as patch:
            patch.setattr(engine.runner, "_finish", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        engine.failure = None
        (output,) = engine.step()  # fails, rather than to take the tokens of the step behind
        assert output.outputs[0].finish_reason == "error"
        assert "is finished" in str(engine.failure)
        assert_idle(engine)
    assert told(llm.generate([50, 51], LONG, use_tqdm=False)) == expected


def test_a_pause_before_the_other_calls_of_a_step_is_none_of_its_time(
    eager_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, found = [100.0], []
    monkeypatch.setattr(PretendedPrograms, "can_start", True)
    monkeypatch.setattr("multibatch.engine.time.monotonic", lambda: clock[0])
    engine, programs = pretended_engine(eager_artifact, selector_policy="one_by_one")
    monkeypatch.setattr(engine.scheduler, "step_done", lambda _, ms: found.append(ms))
    finish = PretendedCall.finish

    def late(call: PretendedCall) -> CallResult:
        return dataclasses.replace(finish(call), late_seconds=1000.0)

    def tick() -> None:
        clock[0] += 1.0

    monkeypatch.setattr(PretendedCall, "finish", late)
    for name in "ab":
        engine.add_request(name, [5], LONG)
    engine.step()
    clock[0] += 1000.0
    programs.on_call = tick
    engine.step()
    assert found[1] == 2000.0  # two calls


def test_an_output_that_ended_is_told_once(eager_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PretendedPrograms, "can_start", True)
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    whole = pretended_engine(eager_artifact)[0]
    whole.add_request("a", [5], params)
    text = whole.run_all()["a"].outputs[0].text
    engine = pretended_engine(eager_artifact, max_num_seqs=1)[0]
    stopping = SamplingParams(
        temperature=0.01, max_tokens=30, ignore_eos=True, n=2, stop=[text[3:6]], output_kind=RequestOutputKind.DELTA
    )
    engine.add_request("a", [5], stopping)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert [c.finish_reason for c in outputs[-1].outputs][-1] == "stop"
    assert all(any(c.token_ids for c in output.outputs) for output in outputs)
    assert_idle(engine)


def test_the_next_step_has_begun_when_one_has_ended(engine: Engine) -> None:
    engine.add_request("a", [5], LONG)
    for _ in range(3):
        engine.step()
        assert engine.is_ahead
    engine.run_all()
    assert_idle(engine)


def test_an_id_may_be_used_again_while_the_step_of_its_old_request_runs(engine: Engine) -> None:
    engine.add_request("a", [5, 6, 7], LONG)
    engine.add_request("b", [9], LONG)
    for _ in range(4):
        engine.step()
    output = engine.abort("a")
    assert output is not None
    assert output.outputs[0].token_ids == expected(engine, [5, 6, 7], 4)
    engine.add_request("a", [8], LONG)
    assert "a" not in tokens_of(engine.step())  # this step was begun before it came
    done = engine.run_all()
    assert done["a"].outputs[0].token_ids == expected(engine, [8], 40)
    assert done["b"].outputs[0].token_ids == expected(engine, [9], 40)
    assert_idle(engine)


def test_nobody_takes_the_name_of_a_completion_that_has_ended(engine: Engine) -> None:
    engine.add_request("a", [5], SamplingParams(temperature=0.5, n=2, max_tokens=8, ignore_eos=True, detokenize=False))
    engine.step()
    engine.scheduler.abort("a#0")
    for name in ("a#0", "a"):
        with pytest.raises(RequestError, match=f"'{name}' is being served already"):
            engine.add_request(name, [6], LONG)
    first, second = engine.run_all()["a"].outputs
    assert (first.finish_reason, len(second.token_ids)) == ("abort", 8)
    assert_idle(engine)


def test_the_abort_of_the_last_request_waits_for_its_step(engine: Engine) -> None:
    engine.add_request("a", [5], LONG)
    engine.step()
    assert engine.is_ahead
    engine.abort("a")
    assert_idle(engine)
    engine.add_request("b", [6], LONG)
    assert engine.run_all()["b"].outputs[0].token_ids == expected(engine, [6], 40)


def test_the_threads_of_torch_rest_while_a_step_runs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    resting = 0

    @contextlib.contextmanager
    def own_threads() -> Iterator[None]:
        nonlocal resting
        resting += 1
        yield
        resting -= 1

    monkeypatch.setattr(engine._programs, "own_threads", own_threads)
    for ends_alone in (True, False):
        engine.add_request("a", [5], LONG)
        while engine.has_unfinished:
            engine.step()
            assert resting == engine.is_ahead
            if not ends_alone:
                engine.abort("a")
        assert resting == 0


def test_what_came_while_a_step_ran_is_in_the_next_one(engine: Engine) -> None:
    engine.add_request("a", [5], LONG)
    engine.step()
    arriving = ["b"]

    def arrivals() -> None:
        if arriving:
            engine.add_request(arriving.pop(), [6, 7], LONG)

    engine.hold_next_step()
    assert list(tokens_of(engine.step(arrivals))) == ["a"]
    assert tokens_of(engine.step(arrivals)) == {
        "b": expected(engine, [6, 7], 1),
        "a": expected(engine, [5], 3),
    }
    engine.run_all()
    assert_idle(engine)


def test_what_came_too_late_for_a_step_that_followed_is_in_the_one_behind(engine: Engine) -> None:
    engine.add_request("a", [5], LONG)
    engine.step()
    calls = 0

    def arrivals() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            engine.add_request("b", [6, 7], LONG)

    assert [list(tokens_of(engine.step(arrivals))) for _ in range(3)] == [["a"], ["a"], ["b", "a"]]
    assert calls == 3
    done = engine.run_all()
    assert done["b"].outputs[0].token_ids == expected(engine, [6, 7], 40)
    assert done["a"].outputs[0].token_ids == expected(engine, [5], 40)
    assert_idle(engine)


def test_no_step_is_run_for_nothing_where_a_token_or_a_count_ends_the_row(
    eager_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PretendedPrograms, "can_start", True)
    engine, programs = pretended_engine(eager_artifact)
    text = expected(engine, [5], 12)
    stopping = SamplingParams(
        temperature=0.0, max_tokens=40, ignore_eos=True, stop_token_ids=[text[-1]], detokenize=False
    )
    engine.add_request("a", [5], stopping)
    assert engine.run_all()["a"].outputs[0].token_ids == text[: text.index(text[-1]) + 1]
    assert programs.num_calls == text.index(text[-1]) + 1
    engine.add_request("b", [5], LONG)
    programs.num_calls = 0
    engine.run_all()
    assert programs.num_calls == 40
    assert_idle(engine)


@pytest.mark.parametrize("temperatures", [[0.0], [0.9], [0.0, 1.4, 0.7]])
def test_steps_follow_each_other_by_themselves(
    demo_artifact: Path, monkeypatch: pytest.MonkeyPatch, temperatures: list[float]
) -> None:
    engine = LLM(demo_artifact, num_threads=2, enable_prefix_caching=False).engine
    alone = LLM(demo_artifact, num_threads=2, async_scheduling=False).engine
    num_followed, schedule_again = 0, engine.scheduler.schedule_again

    def counted(step: ScheduledStep) -> ScheduledStep:
        nonlocal num_followed
        num_followed += 1
        return schedule_again(step)

    monkeypatch.setattr(engine.scheduler, "schedule_again", counted)
    prompts = [[16 + 7 * i + j for j in range(3 * i + 1)] for i in range(6)]
    for number, prompt in enumerate(prompts):
        params = SamplingParams(
            temperature=temperatures[number % len(temperatures)],
            top_p=0.95 if number % 2 else 1.0,
            top_k=40 if number % 3 else 0,
            min_tokens=number,  # known for good only from then on
            max_tokens=60 + number,
            stop_token_ids=[16 + number],
            ignore_eos=True,
            detokenize=False,
        )
        engine.add_request(str(number), prompt, params)
        alone.add_request(str(number), prompt, params)
    assert tokens_of(list(engine.run_all().values())) == tokens_of(list(alone.run_all().values()))
    assert num_followed > 0
    assert_idle(engine)


def test_the_number_of_threads_may_change_while_steps_follow(demo_artifact: Path) -> None:
    llm = LLM(demo_artifact, num_threads=2)
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True, detokenize=False)
    expected = told(llm.generate([50, 51], params, use_tqdm=False))
    stop, num_changes = threading.Event(), 0

    def change() -> None:
        nonlocal num_changes
        while not stop.is_set():
            ops.set_num_threads(2 + num_changes % 2)
            num_changes += 1

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(5):
            assert told(llm.generate([50, 51], params, use_tqdm=False)) == expected
    finally:
        stop.set()
        thread.join()
    assert num_changes > 5
    assert_idle(llm.engine)


def test_whoever_ends_while_a_step_follows_leaves_the_others_whole(engine: Engine) -> None:
    for name, prompt in (("a", [5, 6, 7]), ("b", [9])):
        engine.add_request(name, prompt, LONG)
    engine.step()
    engine.step()
    engine.abort("a")  # the step that runs was to be followed by one with both
    engine.add_request("c", [11] * 20, LONG)  # may get the blocks of the first
    done = engine.run_all()
    assert done["b"].outputs[0].token_ids == expected(engine, [9], 40)
    assert done["c"].outputs[0].token_ids == expected(engine, [11] * 20, 40)
    assert_idle(engine)


def test_a_step_that_followed_may_be_waited_for_too(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.add_request("a", [5], LONG)
    monkeypatch.setattr(engine, "hold_next_step", lambda: None)  # as if it had come too late
    engine.step()
    engine.wait_ahead()
    for num_tokens in (2, 3, 4):
        assert tokens_of(engine.step()) == {"a": expected(engine, [5], num_tokens)}
    engine.wait_ahead()
    engine.abort("a")
    assert_idle(engine)
    used = {use.program: use.num_calls for use in engine.runner.program_uses.values()}
    assert sum(used.values()) == 6


def test_a_call_that_fails_on_its_way_fails_its_requests_by_name(
    eager_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PretendedPrograms, "can_start", True)
    engine, programs = pretended_engine(eager_artifact)

    def fail() -> None:
        programs.on_call = lambda: None
        raise RuntimeError("injected")

    def refuse(*_: Any) -> Any:
        raise RuntimeError("no room")

    engine.add_request("a", [5], LONG)
    engine.step()
    engine.add_request("b", [6], LONG)  # not in the step that runs
    programs.on_call = fail
    with pytest.raises(StepError, match="injected") as caught:
        engine.run_all()
    assert list(caught.value.request_ids) == ["a"]
    assert_idle(engine)
    # One that cannot even begin fails its requests too, and what the step before gave is told.
    engine.add_request("d", [5], LONG)
    engine.step()
    engine.hold_next_step()
    with monkeypatch.context() as patch:
        patch.setattr(programs, "start", refuse)
        assert tokens_of(engine.step()) == {"d": expected(engine, [5], 2)}
    (output,) = engine.step()
    assert output.outputs[0].finish_reason == "error"
    assert "no room" in str(engine.failure)
    assert_idle(engine)
    # Nobody hears of a call whose requests are gone.
    engine.add_request("c", [7], LONG)
    engine.step()
    programs.on_call = fail
    engine.abort("c")
    assert_idle(engine)


def test_it_can_be_asked_for_or_not(eager_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ahead in (None, False):
        engine, _ = pretended_engine(eager_artifact, async_scheduling=ahead)
        engine.add_request("a", [5], LONG)
        engine.step()
        assert not engine.is_ahead
    with pytest.raises(ConfigError, match="async_scheduling is True"):
        Engine(Artifact.open(eager_artifact), EngineConfig(async_scheduling=True))
    monkeypatch.setattr(PretendedPrograms, "can_start", True)
    engine, _ = pretended_engine(eager_artifact, async_scheduling=False)
    engine.add_request("a", [5], LONG)
    engine.step()
    assert not engine.is_ahead
    with pytest.raises(ConfigError, match="async_scheduling is 1"):
        EngineConfig(async_scheduling=1)  # type: ignore[arg-type]
