from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings

# A time limit for an example fails on a machine that somebody else disturbs.
settings.register_profile("multibatch", deadline=None)
settings.load_profile("multibatch")

if TYPE_CHECKING:
    from multibatch import LLM


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Other tests may run beside this one, and OpenMP with as many threads as cores collapses then."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    import multibatch

    return Path(multibatch.__file__).parent / "demo" / "model"


@pytest.fixture(scope="session")
def demo_artifact(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    """The demo model in float32 at sizes 8, 4, 1."""
    from multibatch_compile import compile_model

    target = tmp_path_factory.mktemp("artifacts") / "demo"
    compile_model(
        demo_model, target, decoder_batch_sizes=[8, 4, 1], max_seq_len=256, max_num_batched_tokens=32, dtype="float32"
    )
    return target


@pytest.fixture(scope="session")
def eager_artifact(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    """The demo model for the eager backend: quick to make, for tests of everything around programs."""
    from multibatch_compile import compile_model

    target = tmp_path_factory.mktemp("artifacts") / "eager"
    compile_model(
        demo_model,
        target,
        decoder_batch_sizes=[4, 1],
        max_seq_len=128,
        prefill_chunk_sizes=[16],
        dtype="float32",
        backend="eager",
    )
    return target


@pytest.fixture(scope="session")
def share_of_right_answers() -> Callable[[LLM], float]:
    """Asks 150 questions of every kind at once; each has to end by itself."""
    from multibatch import SamplingParams
    from multibatch.demo.questions import is_correct, sample_question

    def ask(llm: LLM) -> float:
        rng = random.Random(5)
        questions = [sample_question(rng) for _ in range(150)]
        conversations = [[{"role": "user", "content": q.text}] for q in questions]
        outputs = llm.chat(conversations, SamplingParams(temperature=0.0, max_tokens=96), use_tqdm=False)
        assert {o.outputs[0].finish_reason for o in outputs} == {"stop"}
        return sum(is_correct(q, o.outputs[0].text) for q, o in zip(questions, outputs, strict=True)) / len(questions)

    return ask


@pytest.fixture(scope="session")
def greedy() -> Callable[[Any, list[int], int], list[int]]:
    """transformers' own greedy continuation of one prompt, end-of-sequence ignored."""

    def run(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        ids: list[int] = out[0, len(prompt) :].tolist()
        return ids

    return run
