"""`LLM`: offline generation with vLLM's names, over one engine."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from multibatch.beam_search import BeamSearchOutput, BeamSearchParams, beam_search
from multibatch.errors import ConfigError, RequestError
from multibatch.metrics import CallRecord
from multibatch.open_engine import open_engine, open_or_compile
from multibatch.prompts import EncodedPrompt, Prompt, encode_prompt, listed_prompts
from multibatch.request import RequestOutput
from multibatch.sampling_params import RequestOutputKind, SamplingParams

_NOT_BUILT = {
    "lora_request": "LoRA adapters",
    "tools": "tools",
    "mm_processor_kwargs": "multimodal prompts",
    "tokenization_kwargs": "tokenization options",
}


class LLM:
    """Generates with the decoders of an artifact, or of a model that is compiled into the cache first.

    Args:
        model: an artifact's folder, or a Hugging Face model's folder or hub id.
        max_num_seqs: sequences running at once; at most what the artifact was compiled for.
        max_model_len: longest sequence; `max_seq_len` is the same.
        kv_cache_memory_bytes: size of the KV pool.
        num_kv_blocks: size of the KV pool in blocks, instead.
        enable_prefix_caching: keeps full KV blocks for prompts that begin like earlier ones.
        seed: where requests without a seed get theirs from.
        selector_policy: which decoders run n rows: cheapest, nearest, pad_to_max, one_by_one.
        num_threads: threads of the operators, shared by the process.
        compile_options: for a model: keyword arguments of `multibatch_compile.compile_model`.
        engine_options: any other field of `multibatch.config.EngineConfig`: scheduling policies and their targets.

    Raises:
        ArtifactError: the folder does not open.
        ConfigError: an option outside what is allowed, or not known.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        max_num_seqs: int | None = None,
        max_model_len: int | None = None,
        max_seq_len: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        num_kv_blocks: int | None = None,
        enable_prefix_caching: bool = True,
        seed: int = 0,
        selector_policy: str = "cheapest",
        num_threads: int | None = None,
        compile_options: Mapping[str, Any] | None = None,
        **engine_options: Any,
    ) -> None:
        options = {
            "max_num_seqs": max_num_seqs,
            "max_model_len": max_model_len,
            "max_seq_len": max_seq_len,
            "kv_cache_memory_bytes": kv_cache_memory_bytes,
            "num_kv_blocks": num_kv_blocks,
            "enable_prefix_caching": enable_prefix_caching,
            "seed": seed,
            "selector_policy": selector_policy,
            "num_threads": num_threads,
            "compile_options": compile_options,
        }
        self.artifact, self.engine = open_engine(model, options | engine_options)
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        **not_built: Any,
    ) -> list[RequestOutput]:
        """Continues every prompt; results come in the order of the prompts.

        `priority`: one number for each prompt, lower ones first, with `scheduling_policy="priority"`.

        Raises:
            RequestError: a prompt or its parameters can never run here; nothing was run.
            StepError: a step failed; names the requests that failed with it.
        """
        _refuse_not_built(not_built)
        added = self._add_all(prompts, sampling_params, RequestOutputKind.FINAL_ONLY, priority)
        return self._finish(added, use_tqdm)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **not_built: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation, or several, in the model's chat template."""
        _refuse_not_built(not_built)
        if not messages:
            raise RequestError(
                "chat got no messages; give a list of {'role': …, 'content': …}, or a list of such lists"
            )
        conversations: Any = [messages] if isinstance(messages[0], Mapping) else messages
        prompts = [
            self.engine.tokenizer.render_chat(
                conversation,
                chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, priority=priority)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Continues one prompt and yields an output per token."""
        (request_id,) = self._add_all([prompt], sampling_params)
        try:
            while self.engine.has_unfinished:
                yield from (output for output in self.engine.step() if output.request_id == request_id)
            self._raise_failure({request_id})
        finally:
            self.engine.abort(request_id)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, **not_built: Any
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of every prompt, as far as a search of `params.beam_width` beams finds them.

        Raises:
            RequestError: a prompt with its longest beam can never run here; nothing was run.
            StepError: a step failed.
        """
        _refuse_not_built(not_built)
        encoded = [self._encode(prompt) for prompt in listed_prompts(prompts)]
        return beam_search(self.engine, [(prompt.token_ids, prompt.cache_salt) for prompt in encoded], params)

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return self.engine.tokenizer.hf

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses where none are given."""
        return SamplingParams()

    def reset_prefix_cache(self) -> bool:
        """Forgets every cached prefix; True, as in vLLM, because it always can."""
        self.engine.reset_prefix_cache()
        return True

    def take_records(self) -> list[CallRecord]:
        """The program calls since the last time this was asked, the latest `multibatch.runner.MAX_RECORDS` of them."""
        records = list(self.engine.runner.records)
        self.engine.runner.records.clear()
        return records

    def get_metrics(self) -> str:
        """What was done since the start, as Prometheus text; see `multibatch.exposition`."""
        return self.engine.metrics_text()

    def _add_all(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        kind: RequestOutputKind | None = None,
        priority: Sequence[int] | None = None,
    ) -> list[str]:
        given = listed_prompts(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or self.get_default_sampling_params()] * len(given)
        else:
            params = list(sampling_params)
        if len(params) != len(given):
            raise RequestError(f"{len(params)} sampling_params for {len(given)} prompts; give one, or one for each")
        if priority is not None and len(priority) != len(given):
            raise RequestError(f"{len(priority)} priorities for {len(given)} prompts; give one for each, or none")
        self.engine.failure = None
        added: list[str] = []
        try:
            for prompt, p, rank in zip(given, params, priority or [0] * len(given), strict=True):
                encoded = self._encode(prompt)
                p = p if kind is None else dataclasses.replace(p, output_kind=kind)
                request_id = str(next(self._ids))
                self.engine.add_request(
                    request_id, encoded.token_ids, p, encoded.text, priority=rank, cache_salt=encoded.cache_salt
                )
                added.append(request_id)
        except RequestError:
            for request_id in added:
                self.engine.abort(request_id)
            raise
        return added

    def _encode(self, prompt: Prompt) -> EncodedPrompt:
        # Prompts of ids need no tokenizer, so it is only asked for by text.
        return encode_prompt(prompt, lambda text: self.engine.tokenizer.encode(text))

    def _finish(self, request_ids: Sequence[str], use_tqdm: bool) -> list[RequestOutput]:
        done: dict[str, RequestOutput] = {}
        bar: Any = tqdm(total=len(request_ids), desc="Processed prompts", disable=not use_tqdm, dynamic_ncols=True)
        try:
            while self.engine.has_unfinished:
                for output in self.engine.step():
                    if output.finished:
                        done[output.request_id] = output
                        bar.update(1)
        finally:
            bar.close()
            for request_id in request_ids:
                self.engine.abort(request_id)
        self._raise_failure(set(request_ids))
        return [done[request_id] for request_id in request_ids]

    def _raise_failure(self, request_ids: set[str]) -> None:
        failure = self.engine.failure
        if failure is not None and request_ids & set(failure.request_ids):
            raise failure


def _refuse_not_built(options: Mapping[str, Any]) -> None:
    asked = sorted(name for name, value in options.items() if value is not None)
    if asked:
        names = ", ".join(f"{name} ({_NOT_BUILT.get(name, 'unknown option')})" for name in asked)
        raise ConfigError(f"not built yet: {names}; leave it out")


__all__ = ["LLM", "Prompt", "RequestOutputKind", "open_or_compile"]
