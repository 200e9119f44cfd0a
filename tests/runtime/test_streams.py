"""Outputs on their way from a thread to coroutines: none lost, none twice, one wake-up for what was not yet seen."""

from __future__ import annotations

import asyncio
import threading

import pytest

from multibatch.errors import StepError
from multibatch.request import CompletionOutput, FinishReason, Logprob, RequestOutput
from multibatch.sampling_params import RequestOutputKind
from multibatch.streams import Stream, merged, wake


def output_of(*texts: str, finished: bool = False, logprobs: bool = False) -> RequestOutput:
    reason = FinishReason.LENGTH if finished else None
    completions = [
        CompletionOutput(
            index=i,
            text=text,
            token_ids=[ord(c) for c in text],
            cumulative_logprob=-float(len(text)) if logprobs else None,
            logprobs=[{ord(c): Logprob(-1.0)} for c in text] if logprobs else None,
            finish_reason=reason,
        )
        for i, text in enumerate(texts)
    ]
    return RequestOutput("a", None, [1], None, completions, finished)


def test_deltas_add_up() -> None:
    whole = merged(output_of("ab", "x"), output_of("c", "", finished=True), RequestOutputKind.DELTA)
    assert [o.text for o in whole.outputs] == ["abc", "x"]
    assert [o.token_ids for o in whole.outputs] == [[97, 98, 99], [120]]
    assert whole.finished
    assert whole.outputs[0].finish_reason == "length"


def test_deltas_keep_their_logprobs() -> None:
    whole = merged(output_of("ab", logprobs=True), output_of("c", logprobs=True), RequestOutputKind.DELTA)
    assert whole.outputs[0].logprobs is not None
    assert [list(entry) for entry in whole.outputs[0].logprobs] == [[97], [98], [99]]


@pytest.mark.parametrize("kind", [RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY])
def test_of_others_the_later_has_it_all(kind: RequestOutputKind) -> None:
    later = output_of("abc")
    assert merged(output_of("ab"), later, kind) is later


def test_only_the_first_of_what_was_not_taken_wakes() -> None:
    async def run() -> None:
        stream = Stream(RequestOutputKind.DELTA, asyncio.get_running_loop())
        assert [stream.put(output_of(c)) for c in "abc"] == [True, False, False]
        assert (await stream.take()).outputs[0].text == "abc"
        assert stream.put(output_of("d"))

    asyncio.run(run())


def test_an_error_comes_after_every_output() -> None:
    async def run() -> None:
        stream = Stream(RequestOutputKind.DELTA, asyncio.get_running_loop())
        stream.put(output_of("a"))
        stream.fail(StepError("bad", ["a"]))
        assert (await stream.take()).outputs[0].text == "a"
        for _ in range(2):
            with pytest.raises(StepError, match="bad"):
                await stream.take()

    asyncio.run(run())


def test_a_thread_feeds_many_consumers_and_nothing_is_lost() -> None:
    num_streams, num_outputs = 20, 500

    async def consume(stream: Stream, pause: bool) -> str:
        text = ""
        while True:
            output = await stream.take()
            text += output.outputs[0].text
            if output.finished:
                return text
            if pause:
                await asyncio.sleep(0.002)

    async def run() -> list[str]:
        loop = asyncio.get_running_loop()
        streams = [Stream(RequestOutputKind.DELTA, loop) for _ in range(num_streams)]

        def produce() -> None:
            for i in range(num_outputs):
                last = i == num_outputs - 1
                wake([s for s in streams if s.put(output_of(chr(97 + i % 26), finished=last))])

        thread = threading.Thread(target=produce)
        thread.start()
        texts = await asyncio.gather(*(consume(stream, i % 2 == 0) for i, stream in enumerate(streams)))
        thread.join()
        return texts

    expected = "".join(chr(97 + i % 26) for i in range(num_outputs))
    assert asyncio.run(run()) == [expected] * num_streams


def test_consumers_of_a_closed_loop_are_named() -> None:
    loop = asyncio.new_event_loop()
    stream = Stream(RequestOutputKind.DELTA, loop)
    assert wake([stream]) == []
    loop.close()
    assert wake([stream]) == [stream]
    assert wake([]) == []
