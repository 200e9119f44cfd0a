"""Judges a demo model: greedy replies to questions that the training never saw, counted by kind."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from multibatch.demo.questions import (
    KINDS,
    Question,
    held_out_questions,
    is_correct,
    sample_question,
    training_questions,
)


@torch.inference_mode()
def reply_to(model: Any, tokenizer: Any, conversations: Sequence[Sequence[Question]], batch: int = 128) -> list[str]:
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
    prompt: str = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
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
        [question] for kind in small for question in training_questions(kind) + held_out_questions(kind)
    ]
    sets["chat"] = [[sample_question(rng, held_out=True) for _ in range(rng.randint(2, 11))] for _ in range(2 * limit)]
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
