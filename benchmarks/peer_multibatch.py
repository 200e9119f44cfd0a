"""multibatch as one of the engines of a side-by-side measurement: greedy, token ids in and out, one call at a time.

The kit that runs the engines in turn brings `common` (workloads, clock, JSON lines) and starts this as
`peer_multibatch.py VARIANT w1|w2|check`. A variant is `bf16`, `int8` or `int4`: one program for any batch size up to 16; with a ladder
after a colon, such as `bf16:1,4,16`, a decoder for each size. Artifacts are kept and used again.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import common

import multibatch
from multibatch.artifact import Artifact
from multibatch.config import EngineConfig
from multibatch.engine import Engine
from multibatch.sampling_params import RequestOutputKind, SamplingParams

MOST = 16
MAX_SEQ_LEN = 1280
QUANTIZATION = {"bf16": "none", "int8": "int8", "int4": "int4"}


def load(model_dir: str, variant: str, max_running: int) -> Engine:
    """The engine over the variant's artifact, which is compiled first if it is not there."""
    kind, _, sizes = variant.partition(":")
    ladder = [int(size) for size in sizes.split(",")] if sizes else "any"
    target = Path(common.HOME) / "artifacts" / f"{Path(model_dir).name}-{kind}-{sizes.replace(',', '-') or 'any'}"
    if not target.is_dir():
        import multibatch_compile

        target.parent.mkdir(exist_ok=True)
        multibatch_compile.compile_model(
            model_dir,
            target,
            decoder_batch_sizes=ladder,
            max_num_seqs=max(ladder) if isinstance(ladder, list) else MOST,
            max_seq_len=MAX_SEQ_LEN,
            dtype="bfloat16",
            quantization=QUANTIZATION[kind],
        )
    artifact = Artifact.open(target)
    limit = min(max_running, artifact.manifest.max_num_seqs)
    # without the prefix cache: the same prompts come again in every repetition
    config = EngineConfig(max_num_seqs=limit, num_threads=common.THREADS, enable_prefix_caching=False)
    return Engine(artifact, config)


def generate(engine: Engine, requests: list[Any]) -> list[Any]:
    """Queues every request, runs until all have ended; times are taken as each token comes out of the engine."""
    for i, request in enumerate(requests):
        params = SamplingParams(
            temperature=0.0,
            max_tokens=request.n_new,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        engine.add_request(str(i), request.prompt, params)
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    ids: dict[str, list[int]] = {str(i): [] for i in range(len(requests))}
    while engine.has_unfinished:
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            ids[output.request_id] += output.outputs[0].token_ids
            first.setdefault(output.request_id, now)
            last[output.request_id] = now
    if engine.failure is not None:
        raise engine.failure
    return [common.Result(first[str(i)], last[str(i)], ids[str(i)]) for i in range(len(requests))]


if __name__ == "__main__":
    common.main("multibatch", load, generate, lambda: f"multibatch {multibatch.__version__}")
