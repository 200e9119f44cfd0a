"""Turns what callers ask into requests that an engine can run, and refuses what it cannot."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence as AnySequence

from multibatch.constraints import Constraints
from multibatch.engine_limits import check_request
from multibatch.errors import RequestError
from multibatch.groups import Completion, Group
from multibatch.manifest import Manifest
from multibatch.request import Request, Sequence, resolve_seed
from multibatch.sampling_params import SamplingParams
from multibatch.scheduler import SchedulerConfig
from multibatch.tokenizer import Detokenizer, TokenizerFolder


class Intake:
    """Makes the requests of one engine."""

    def __init__(self, manifest: Manifest, limits: SchedulerConfig, tokenizer: TokenizerFolder, seed: int) -> None:
        """Joins what requests are checked against.

        Args:
            manifest: of the artifact that serves them.
            limits: of the engine's scheduler.
            tokenizer: for their text.
            seed: `EngineConfig.seed`, which theirs come from.
        """
        self._manifest = manifest
        self._limits = limits
        self._tokenizer = tokenizer
        self._constraints = Constraints(manifest.model, tokenizer.get)
        self._seed = seed

    def group(
        self,
        request_id: str,
        prompt_token_ids: AnySequence[int],
        params: SamplingParams,
        prompt: str | None,
        *,
        number: int,
        priority: int,
        cache_salt: str | None,
        arrived: float | None,
    ) -> Group:
        """A request; see `Engine.add_request`.

        Raises:
            RequestError: it can never run here.
        """
        check_request(request_id, prompt_token_ids, params, self._manifest, self._limits.max_seq_len)
        if priority and self._limits.queue_policy != "priority":
            raise RequestError(
                f"request {request_id!r}: priority {priority}, and the engine serves first come, first served;"
                ' give it scheduling_policy="priority", or leave the priority out'
            )
        rules = self._constraints.rules(request_id, params)
        now = time.monotonic()
        queued = now if arrived is None else arrived
        group = Group(
            request_id, prompt, list(prompt_token_ids), params, [], rules, [None], time.time() - (now - queued), queued
        )
        for child in range(params.n):
            # One of them tells of the prompt for all.
            is_mute = child > 0 and params.prompt_logprobs is not None
            request = Request(
                request_id=request_id if params.n == 1 else f"{request_id}#{child}",
                prompt_token_ids=tuple(prompt_token_ids),
                params=dataclasses.replace(params, prompt_logprobs=None) if is_mute else params,
                prompt=prompt,
                arrival_time=group.arrival_time,
                seed=resolve_seed(params.seed, number, self._seed, child_index=child),
                eos_token_ids=self._manifest.model.eos_token_ids,
                priority=priority,
                cache_salt=cache_salt,
            )
            group.completions.append(self._completion(request))
        return group

    def _completion(self, request: Request) -> Completion:
        params, detokenizer = request.params, None
        if params.detokenize and (self._tokenizer.exists or params.stop):
            detokenizer = Detokenizer(self._tokenizer.get(), params.stop, params.skip_special_tokens)
        return Completion(Sequence(request), detokenizer, self._constraints.matcher(request.request_id, params))
