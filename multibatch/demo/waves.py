"""The demo: waves of conversations through one LLM, with what each decoder did."""

from __future__ import annotations

import random
import statistics
import time

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from multibatch.demo.questions import Question, is_correct, sample_question
from multibatch.llm import LLM
from multibatch.metrics import summarise
from multibatch.sampling_params import SamplingParams

WAVES = (1, 3, 4, 7, 8)
"""Conversations of each wave."""


def questions_of(num: int, seed: int) -> list[Question]:
    """Questions for one wave, the same at every run."""
    rng = random.Random(seed)
    return [sample_question(rng) for _ in range(num)]


def run_waves(llm: LLM, console: Console) -> None:
    """Sends each wave, prints the answers, then which decoder ran how many steps."""
    table = Table(title="What ran", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("wave", "program", "calls", "live", "padded", "TTFT ms", "ms/token", "tokens/s"):
        table.add_column(name, justify="left" if name == "program" else "right", no_wrap=True)
    params = SamplingParams(temperature=0.0, max_tokens=96)
    # Once unmeasured: the first conversation of a process also imports what renders chat templates, which takes half a second.
    llm.chat([{"role": "user", "content": "Spell water."}], SamplingParams(max_tokens=1), use_tqdm=False)
    for number, size in enumerate(WAVES):
        questions = questions_of(size, seed=number)
        llm.take_records()
        start = time.perf_counter()
        outputs = llm.chat([[{"role": "user", "content": q.text}] for q in questions], params, use_tqdm=False)
        elapsed = time.perf_counter() - start
        console.print(f"\n[bold]Wave of {size}[/bold]")
        for question, output in zip(questions, outputs, strict=True):
            reply = output.outputs[0].text
            mark = "[green]right[/green]" if is_correct(question, reply) else "[red]wrong[/red]"
            console.print(f"  {escape(question.text)}  →  {escape(reply)}  {mark}", highlight=False, soft_wrap=True)
        tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
        metrics = [o.metrics for o in outputs if o.metrics is not None]
        first = statistics.mean(m.ttft_s or 0.0 for m in metrics) * 1000
        each = [m.time_per_output_token_s for m in metrics if m.time_per_output_token_s is not None]
        per_token = f"{statistics.mean(each) * 1000:.2f}" if each else "-"
        for i, use in enumerate(summarise(llm.take_records())):
            whole = (str(size), f"{first:.1f}", per_token, f"{tokens / elapsed:.0f}") if i == 0 else ("", "", "", "")
            counts = (str(use.num_calls), str(use.num_live), str(use.num_padded))
            table.add_row(whole[0], use.program, *counts, *whole[1:])
    console.print()
    console.print(table)
    console.print("live, padded: rows summed over the calls (tokens for a prefill program).", style="dim")
