"""One engine in a process of its own, driven by `peers.py` over JSON lines.

Usage: peer_engines.py KIND PATH '{"threads": 4, "max_running": 8, "max_len": 384}', with the Python that has the engine.
The first line out names its version. Then each line in is a job, {"prompts", "lengths"}, answered with
when each request's first and last token came, in seconds after the job's start, and how many tokens it got; or
{"rates": true}, answered with what the machine can do (multibatch only). Needs nothing but that engine.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
from typing import Any, Protocol

BATCHED_TOKENS = 2048
KV_GIB = 4
# Steps without a token, one after the other, until a request counts as ended early; long prompts take some.
IDLE_STEPS = 1000


class PeerEngine(Protocol):
    """Greedy decoding of token ids, end-of-sequence ignored, without a prefix cache."""

    version: str
    keeps_limit: bool
    """Whether it runs `max_running` requests at most when more are queued."""

    def add(self, request: int, prompt: list[int], num_tokens: int) -> None:
        """Queues a request."""

    def step(self) -> list[tuple[int, int]]:
        """Runs one step: (request, new tokens) of each request that got any."""


class Multibatch:
    """This project, over an artifact."""

    keeps_limit = True

    def __init__(self, path: str, threads: int, max_running: int, max_len: int) -> None:
        from multibatch import __version__
        from multibatch.artifact import Artifact
        from multibatch.config import EngineConfig
        from multibatch.engine import Engine
        from multibatch.sampling_params import RequestOutputKind, SamplingParams

        self.version = f"multibatch {__version__}, torch {importlib.import_module('torch').__version__}"
        self.artifact = Artifact.open(path)
        config = EngineConfig(max_num_seqs=max_running, num_threads=threads, enable_prefix_caching=False)
        self.engine = Engine(self.artifact, config)
        self._params = lambda num_tokens: SamplingParams(
            temperature=0.0,
            max_tokens=num_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def add(self, request: int, prompt: list[int], num_tokens: int) -> None:
        """Queues a request."""
        self.engine.add_request(str(request), prompt, self._params(num_tokens))

    def step(self) -> list[tuple[int, int]]:
        """Runs one step."""
        outputs = self.engine.step()
        if self.engine.failure is not None:
            raise self.engine.failure
        return [(int(output.request_id), len(output.outputs[0].token_ids)) for output in outputs]

    def rates(self) -> dict[str, float | None]:
        """What the operators and the memory reach on this machine, now."""
        from multibatch.machine_rates import measure_roofline

        measured = measure_roofline(self.artifact.manifest)
        return {"bandwidth_gbps": measured.bandwidth_gbps, "gproducts": measured.gproducts}


class OpenVino:
    """OpenVINO GenAI's continuous batching on the CPU; compute type and KV precision are its own choice."""

    keeps_limit = False  # with dynamic_split_fuse it does not keep to max_num_seqs

    def __init__(self, path: str, threads: int, max_running: int, max_len: int) -> None:
        self._genai, self._openvino = importlib.import_module("openvino_genai"), importlib.import_module("openvino")
        self.version = f"openvino-genai {self._genai.__version__}"
        scheduler = self._genai.SchedulerConfig()
        settings = {
            "max_num_seqs": max_running,
            "max_num_batched_tokens": BATCHED_TOKENS,
            "cache_size": KV_GIB,
            "dynamic_split_fuse": True,
            "enable_prefix_caching": False,
        }
        for name, value in settings.items():
            setattr(scheduler, name, value)
        properties = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": "1"}
        self._pipeline = self._genai.ContinuousBatchingPipeline(path, scheduler, "CPU", properties)
        self._left: dict[int, int] = {}
        self._handles: dict[int, Any] = {}
        self._num_added = 0

    def add(self, request: int, prompt: list[int], num_tokens: int) -> None:
        """Queues a request."""
        numpy = importlib.import_module("numpy")
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample, config.eos_token_id = num_tokens, True, False, -1
        ids = self._openvino.Tensor(numpy.array([prompt], dtype=numpy.int64))
        self._handles[request] = self._pipeline.add_request(self._num_added, ids, config)
        self._left[request] = num_tokens
        self._num_added += 1

    def step(self) -> list[tuple[int, int]]:
        """Runs one step."""
        self._pipeline.step()
        made: list[tuple[int, int]] = []
        for request, handle in list(self._handles.items()):
            if handle.can_read():
                num_new = sum(len(output.generated_ids) for output in handle.read().values())
                made.append((request, num_new))
                self._left[request] -= num_new
                if self._left[request] <= 0:
                    del self._handles[request]
        return made


class LlamaCpp:
    """llama.cpp with one llama_decode per step: the running sequences and the prompts that are let in beside them."""

    keeps_limit = True

    def __init__(self, path: str, threads: int, max_running: int, max_len: int) -> None:
        self._lib = lib = importlib.import_module("llama_cpp")
        self._numpy = importlib.import_module("numpy")
        self.version = f"llama-cpp-python {lib.__version__}"
        lib.llama_backend_init()
        model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not model:
            raise FileNotFoundError(path)
        self._vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self._room = max(BATCHED_TOKENS, max_len)
        params = lib.llama_context_default_params()
        # a KV stream for each sequence, whose length is a multiple of 256
        params.n_seq_max, params.kv_unified = max_running, False
        params.n_ctx = max_running * 256 * math.ceil(max_len / 256)
        params.n_batch = self._room
        params.n_threads = params.n_threads_batch = threads
        self._context = lib.llama_init_from_model(model, params)
        self._batch = lib.llama_batch_init(self._room, 0, 1)
        self._waiting: list[tuple[int, list[int], int]] = []
        # of each slot: request, ids to feed next, position of the first of them, tokens still to make
        self._slots: list[tuple[int, list[int], int, int] | None] = [None] * max_running

    def add(self, request: int, prompt: list[int], num_tokens: int) -> None:
        """Queues a request."""
        self._waiting.append((request, prompt, num_tokens))

    def step(self) -> list[tuple[int, int]]:
        """Runs one step."""
        # tokens in slot order, the lowest free slot first: otherwise llama_decode splits the batch by streams
        room = self._room - sum(slot is not None for slot in self._slots)
        for number, slot in enumerate(self._slots):
            if slot is None and self._waiting and len(self._waiting[0][1]) <= room:
                request, prompt, num_tokens = self._waiting.pop(0)
                room -= len(prompt)
                self._slots[number] = request, prompt, 0, num_tokens
        batch, count, rows = self._batch, 0, {}
        for number, slot in enumerate(self._slots):
            if slot is not None:
                _, ids, start, _ = slot
                for position, token in enumerate(ids, start):
                    batch.token[count], batch.pos[count], batch.n_seq_id[count] = token, position, 1
                    batch.seq_id[count][0], batch.logits[count] = number, position == start + len(ids) - 1
                    count += 1
                rows[number] = count - 1
        batch.n_tokens = count
        if (status := self._lib.llama_decode(self._context, batch)) != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return [self._advance(number, row) for number, row in rows.items()]

    def _advance(self, number: int, row: int) -> tuple[int, int]:
        """Takes the likeliest token of a slot, and frees the slot after its last."""
        slot = self._slots[number]
        assert slot is not None
        request, ids, start, left = slot
        logits = self._lib.llama_get_logits_ith(self._context, row)
        token = int(self._numpy.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())
        if left == 1:
            self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), number, -1, -1)
            self._slots[number] = None
        else:
            self._slots[number] = request, [token], start + len(ids), left - 1
        return request, 1


class Ort:
    """ONNX Runtime GenAI's Generator: one static batch at a time, of prompts and answers of one length."""

    keeps_limit = True

    def __init__(self, path: str, threads: int, max_running: int, max_len: int) -> None:
        self._genai, self._numpy = importlib.import_module("onnxruntime_genai"), importlib.import_module("numpy")
        self.version = f"onnxruntime-genai {self._genai.__version__}"
        config = self._genai.Config(path)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = self._genai.Model(config)
        self._waiting: list[tuple[int, list[int], int]] = []
        self._generator: Any = None
        self._running: tuple[int, ...] = ()

    def add(self, request: int, prompt: list[int], num_tokens: int) -> None:
        """Queues a request."""
        self._waiting.append((request, prompt, num_tokens))

    def step(self) -> list[tuple[int, int]]:
        """Runs one step."""
        if self._generator is None:
            if len({(len(prompt), num_tokens) for _, prompt, num_tokens in self._waiting}) != 1:
                raise ValueError("a static batch needs prompts and answers of one length")
            requests, prompts, (num_tokens, *_) = zip(*self._waiting, strict=True)
            params, longest = self._genai.GeneratorParams(self._model), len(prompts[0]) + num_tokens
            params.set_search_options(batch_size=len(prompts), min_length=longest, max_length=longest, do_sample=False)
            self._generator = self._genai.Generator(self._model, params)
            self._generator.append_tokens(self._numpy.array(prompts, dtype=self._numpy.int32))
            self._running, self._waiting = requests, []
        self._generator.generate_next_token()
        if self._generator.is_done():
            self._generator = None
        return [(request, 1) for request in self._running]


class Vllm:
    """vLLM's CPU backend in bfloat16, which runs the model in a process of its own."""

    keeps_limit = True

    def __init__(self, path: str, threads: int, max_running: int, max_len: int) -> None:
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
        os.environ.pop("OMP_NUM_THREADS", None)  # it goes by the binding
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB)}
        os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        vllm = importlib.import_module("vllm")
        self.version = f"vllm {vllm.__version__}"
        self._engine = vllm.LLM(
            model=path,
            dtype="bfloat16",
            max_model_len=max_len,
            max_num_seqs=max_running,
            max_num_batched_tokens=max(BATCHED_TOKENS, max_len),
            enable_prefix_caching=False,
        ).llm_engine
        delta = importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA
        self._params = lambda num_tokens: vllm.SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, output_kind=delta
        )

    def add(self, request: int, prompt: list[int], num_tokens: int) -> None:
        """Queues a request."""
        self._engine.add_request(str(request), {"prompt_token_ids": prompt}, self._params(num_tokens))

    def step(self) -> list[tuple[int, int]]:
        """Runs one step."""
        return [(int(output.request_id), len(output.outputs[0].token_ids)) for output in self._engine.step()]


ENGINES: dict[str, type[Any]] = {
    "multibatch": Multibatch,
    "openvino": OpenVino,
    "llamacpp": LlamaCpp,
    "ort": Ort,
    "vllm": Vllm,
}


def generate(
    engine: PeerEngine, max_running: int, prompts: list[list[int]], lengths: list[int]
) -> dict[str, list[float] | list[int]]:
    """Runs every request to its length, or until the engine makes nothing more; `peers.py` counts."""
    fed = len(prompts) if engine.keeps_limit else max_running
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    num_tokens = [0] * len(prompts)
    next_one, running, num_idle = 0, 0, 0
    start = time.perf_counter()
    while (running or next_one < len(prompts)) and num_idle < IDLE_STEPS:
        while running < fed and next_one < len(prompts):
            engine.add(next_one, prompts[next_one], lengths[next_one])
            next_one, running = next_one + 1, running + 1
        made = engine.step()
        now = time.perf_counter() - start
        num_idle = 0 if made else num_idle + 1
        for request, num_new in made:
            if num_new:
                first.setdefault(request, now)
                last[request] = now
                num_tokens[request] += num_new
                running -= num_tokens[request] >= lengths[request] > num_tokens[request] - num_new
    order = range(len(prompts))
    return {
        "first": [first.get(i, 0.0) for i in order],
        "last": [last.get(i, 0.0) for i in order],
        "num_tokens": num_tokens,
    }


def main() -> None:
    """Answers until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the engine prints, in C++ too, must not mix with the answers
    kind, path, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings["threads"]])
    engine = ENGINES[kind](path, **settings)
    print(json.dumps({"version": engine.version}), file=answers)
    for line in sys.stdin:
        job = json.loads(line)
        print(
            json.dumps(engine.rates() if "rates" in job else generate(engine, settings["max_running"], **job)),
            file=answers,
        )


if __name__ == "__main__":
    main()
