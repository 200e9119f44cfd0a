"""Trains the demo model from scratch and saves it as a Hugging Face folder.

Run it with `python -m multibatch.demo.train`; unless told otherwise it replaces the model inside the package.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch.nn import functional
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from multibatch.demo.conversations import IGNORED, ConversationEncoder
from multibatch.demo.evaluation import report
from multibatch.demo.tokenizer import CONTEXT, build_tokenizer

DEFAULT_OUT = Path(__file__).parent / "model"


@dataclass(frozen=True)
class Recipe:
    """What a training run depends on, its seed included.

    Attributes:
        steps: The number of optimizer steps.
        seed: The seed of the weights and of the data.
        learning_rate: The peak of the schedule.
        warmup: The number of steps over which the learning rate rises to its peak.
        weight_decay: The decay of the weight matrices.
        batch_tokens: About how many tokens a batch holds, padding included.
    """

    steps: int
    seed: int
    learning_rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.05
    batch_tokens: int = 4096


def build_model(tokenizer: Any, seed: int) -> Qwen2ForCausalLM:
    """Makes the untrained model in float32."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """The learning rate of a step as a share of its peak: linear warm-up, then a cosine to 1 %."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def answer_loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of the answer tokens."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    wanted = targets != IGNORED
    # Only the answers reach the output layer: most positions carry no loss.
    return functional.cross_entropy(model.lm_head(hidden[wanted]), targets[wanted])


def _optimizer(model: Any, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))


def train(model: Any, tokenizer: Any, recipe: Recipe, out: Path, checkpoint_seconds: float) -> float:
    """Trains the model in place, and saves it to the folder now and then.

    Args:
        model: The model, in float32.
        tokenizer: Its tokenizer.
        recipe: The settings of the run.
        out: The folder for checkpoints.
        checkpoint_seconds: About how many seconds lie between two checkpoints.

    Returns:
        The seconds that the training took.
    """
    encoder = ConversationEncoder(tokenizer)
    rng = random.Random(recipe.seed)
    optimizer = _optimizer(model, recipe)
    started = saved = time.monotonic()
    mean_loss = 0.0
    model.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_factor(step, recipe)
        loss = answer_loss(model, *encoder.batch(rng, recipe.batch_tokens))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean_loss += (loss.item() - mean_loss) / (step % 100 + 1)
        now = time.monotonic()
        if step % 100 == 99:
            click.echo(f"step {step + 1:6d}  loss {mean_loss:.5f}  {now - started:7.1f} s")
            mean_loss = 0.0
        if now - saved > checkpoint_seconds:
            save(model, tokenizer, out)
            saved = now
    return time.monotonic() - started


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Writes the model in bfloat16, its tokenizer and its generation settings."""
    out.mkdir(parents=True, exist_ok=True)
    half: Any = Qwen2ForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    half.config.dtype = torch.bfloat16
    half.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=128,
    )
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for file in out.iterdir():
        # Weights are written readable by their owner only, and a package would ship them so.
        file.chmod(0o644)


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_OUT,
    help="Folder to write; by default the one inside the package.",
)
@click.option("--steps", type=click.IntRange(min=1), default=3000, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--batch-tokens", type=click.IntRange(min=512), default=4096, show_default=True)
@click.option(
    "--questions",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="At most this many held-out questions per kind in the evaluation.",
)
@click.option("--evaluate-only", is_flag=True, help="Only judge the model already in --out.")
@click.option("--checkpoint-seconds", type=click.FloatRange(min=1.0), default=60.0, show_default=True)
def main(
    out: Path,
    steps: int,
    threads: int,
    seed: int,
    batch_tokens: int,
    questions: int,
    checkpoint_seconds: float,
    evaluate_only: bool,
) -> None:
    """Trains the demo model, saves it and prints its share of right answers."""
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    if evaluate_only:
        report(out, seed, questions)
        return
    tokenizer = build_tokenizer(seed)
    model = build_model(tokenizer, seed)
    count = sum(parameter.numel() for parameter in model.parameters())
    click.echo(f"{count} parameters, {len(tokenizer)} tokens")
    recipe = Recipe(steps=steps, seed=seed, batch_tokens=batch_tokens)
    seconds = train(model, tokenizer, recipe, out, checkpoint_seconds)
    save(model, tokenizer, out)
    click.echo(f"trained {steps} steps in {seconds:.0f} s with {threads} threads")
    report(out, seed, questions)


if __name__ == "__main__":
    main()
