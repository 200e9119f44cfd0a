"""Trains the demo model from scratch and saves it as a Hugging Face folder.

@@TRAINING@@
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging

from multibatch.demo.questions import (
    KINDS,
    Question,
    held_out_questions,
    is_correct,
    sample_question,
    training_questions,
)

DEFAULT_OUT = Path(__file__).parent / "model"
END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
IGNORED = -100
"""The label of a position that carries no loss."""

VOCABULARY_SIZE = 768
CONTEXT = 2048

# ChatML without a default system prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# The split of the Qwen2 tokenizer, which gives every digit a token of its own. A loader that
# rebuilds the tokenizer by the model's type instead of reading its file gets the same split.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The lengths that training conversations are filled up to, and how often each is used. A turn
# takes about 30 tokens, so a row holds two to twelve turns, and its first turn has no history.
_ROW_LENGTHS = (128, 192, 384)
_ROW_LENGTH_WEIGHTS = (6.0, 3.0, 1.0)


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


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on generated conversations."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [END_OF_TEXT, TURN_START, TURN_END]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_text(random.Random(seed)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _tokenizer_text(rng: random.Random) -> Iterator[str]:
    # Kinds are drawn evenly here: the sums would crowd the words out of a small vocabulary.
    for kind in KINDS:
        for _ in range(400):
            question = sample_question(rng, kind, held_out=False)
            yield f"user\n{question.text}"
            yield f"assistant\n{question.answer}"


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


class ConversationEncoder:
    """Turns questions into token ids and labels, as the chat template writes them."""

    def __init__(self, tokenizer: Any) -> None:
        """Keeps the tokenizer and the tokens that every turn shares."""
        self._tokenizer = tokenizer
        self.pad_id: int = tokenizer.pad_token_id

    def encode(self, turns: Sequence[Question]) -> tuple[list[int], list[int]]:
        """The token ids of a conversation, and its labels: the answers with their end marks."""
        ids: list[int] = []
        labels: list[int] = []
        for turn in turns:
            prompt = self._ids(f"{TURN_START}user\n{turn.text}{TURN_END}\n{TURN_START}assistant\n")
            answer = self._ids(f"{turn.answer}{TURN_END}")
            newline = self._ids("\n")
            ids += prompt + answer + newline
            labels += [IGNORED] * len(prompt) + answer + [IGNORED] * len(newline)
        return ids, labels

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _fill(self, rng: random.Random, length: int) -> tuple[list[int], list[int]]:
        """A conversation of at least one turn, ended by the first turn that would not fit."""
        ids: list[int] = []
        labels: list[int] = []
        while True:
            turn_ids, turn_labels = self.encode([sample_question(rng, held_out=False)])
            if ids and len(ids) + len(turn_ids) > length:
                return ids, labels
            ids += turn_ids
            labels += turn_labels

    def batch(self, rng: random.Random, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws one batch of conversations, each of as many turns as fit into its row.

        Args:
            rng: The source of randomness.
            tokens: About how many tokens the batch may hold.

        Returns:
            The token ids and the labels, both (rows, length) and padded on the right. The mask
            of a causal model hides padding on the right by itself.
        """
        length = rng.choices(_ROW_LENGTHS, weights=_ROW_LENGTH_WEIGHTS)[0]
        rows = [self._fill(rng, length) for _ in range(max(1, tokens // length))]
        longest = max(len(row_ids) for row_ids, _ in rows)
        ids = torch.full((len(rows), longest), self.pad_id)
        labels = torch.full((len(rows), longest), IGNORED)
        for row, (row_ids, row_labels) in enumerate(rows):
            ids[row, : len(row_ids)] = torch.tensor(row_ids)
            labels[row, : len(row_labels)] = torch.tensor(row_labels)
        return ids, labels


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


def train(
    model: Any, tokenizer: Any, recipe: Recipe, out: Path, checkpoint_seconds: float
) -> float:
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


@torch.inference_mode()
def reply_to(
    model: Any, tokenizer: Any, conversations: Sequence[Sequence[Question]], batch: int = 128
) -> list[str]:
    """The greedy replies to the last question of each conversation.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        conversations: The turns of each conversation; all but the last with their right answers.
        batch: The number of conversations that are generated at once.
    """
    # Neighbours of one length waste the least padding.
    order = sorted(
        range(len(conversations)),
        key=lambda i: sum(len(q.text) + len(q.answer) for q in conversations[i]),
    )
    replies = [""] * len(conversations)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        prompts = [_prompt(tokenizer, conversations[i]) for i in chosen]
        inputs = tokenizer(
            prompts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=128,
        )
        width = inputs["input_ids"].shape[1]
        texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            replies[i] = text
    return replies


def _prompt(tokenizer: Any, turns: Sequence[Question]) -> str:
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": turn.text})
        messages.append({"role": "assistant", "content": turn.answer})
    prompt: str = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, tokenize=False
    )
    return prompt


def evaluation_sets(seed: int, limit: int) -> dict[str, list[list[Question]]]:
    """The conversations to judge a model on, by the name of their row in the table.

    Each kind's row holds single held-out questions of the kind, at most `limit`. The rows "all
    facts" and "chat" hold every question of the kinds that are small tables, trained or not, and
    held-out questions of any kind that follow one to ten other turns.
    """
    rng = random.Random(seed)
    sets: dict[str, list[list[Question]]] = {}
    for kind in KINDS:
        questions = held_out_questions(kind)
        chosen = rng.sample(questions, min(limit, len(questions)))
        sets[kind] = [[question] for question in chosen]
    small = [kind for kind in KINDS if len(training_questions(kind)) < 400]
    sets["all facts"] = [
        [question]
        for kind in small
        for question in training_questions(kind) + held_out_questions(kind)
    ]
    sets["chat"] = [
        [sample_question(rng, held_out=True) for _ in range(rng.randint(2, 11))]
        for _ in range(2 * limit)
    ]
    return sets


def evaluate(
    model: Any, tokenizer: Any, sets: dict[str, list[list[Question]]]
) -> tuple[dict[str, float], list[tuple[Question, str]]]:
    """The share of right answers in each set, and every wrong reply with its question."""
    names = [name for name, conversations in sets.items() for _ in conversations]
    conversations = [turns for group in sets.values() for turns in group]
    replies = reply_to(model, tokenizer, conversations)
    right = dict.fromkeys(sets, 0)
    wrong = []
    for name, turns, reply in zip(names, conversations, replies, strict=True):
        if is_correct(turns[-1], reply):
            right[name] += 1
        else:
            wrong.append((turns[-1], reply))
    return {name: right[name] / len(sets[name]) for name in sets}, wrong


def report(out: Path, seed: int, limit: int) -> None:
    """Evaluates the saved folder in both number formats and prints the table."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    sets = evaluation_sets(seed + 1, limit)
    columns: list[dict[str, float]] = []
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(out, dtype=dtype).eval()
        scores, wrong = evaluate(model, tokenizer, sets)
        columns.append(scores)
        shown: Counter[str] = Counter()
        for question, reply in wrong:
            shown[question.kind] += 1
            if shown[question.kind] > 5:
                continue
            click.echo(f"wrong in {dtype}: {question.text!r} got {reply!r}")
    click.echo(f"{'set':14s} {'questions':>9s} {'float32':>9s} {'bfloat16':>9s}")
    for name, conversations in sets.items():
        values = " ".join(f"{100 * scores[name]:8.2f}%" for scores in columns)
        click.echo(f"{name:14s} {len(conversations):9d} {values}")


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_OUT,
    help="Folder to write; by default the one inside the package.",
)
@click.option("--steps", type=click.IntRange(min=1), default=3500, show_default=True)
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
@click.option(
    "--checkpoint-seconds", type=click.FloatRange(min=1.0), default=60.0, show_default=True
)
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
