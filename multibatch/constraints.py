"""Turns what requests ask of their tokens into what the sampler reads: rules once per request, a matcher per output."""

from __future__ import annotations

from collections.abc import Callable

from multibatch.errors import RequestError
from multibatch.grammar import Grammars, Matcher
from multibatch.logits_masks import TokenRules
from multibatch.manifest import ModelInfo
from multibatch.sampling_params import SamplingParams
from multibatch.tokenizer import Tokenizer


class Constraints:
    """Makes rules and matchers for the model of one engine, and keeps the compiled forms."""

    def __init__(self, model: ModelInfo, tokenizer: Callable[[], Tokenizer]) -> None:
        """`tokenizer` is called only where a request needs it; it raises RequestError where the artifact has none."""
        self._model = model
        self._tokenizer = tokenizer
        self._grammars: Grammars | None = None

    def rules(self, request_id: str, params: SamplingParams) -> TokenRules | None:
        """What biases, allowed tokens and bad words ask for, if anything.

        Raises:
            RequestError: they cannot be followed here.
        """
        stops = (*self._model.eos_token_ids, *params.stop_token_ids)
        try:
            return TokenRules.of(params, self._model.vocab_size, self._encode, stops)
        except RequestError as error:
            raise RequestError(f"request {request_id!r}: {error}") from error

    def matcher(self, request_id: str, params: SamplingParams) -> Matcher | None:
        """What keeps one output to `structured_outputs`, if anything.

        Raises:
            RequestError: the form does not compile, or nothing is here that could keep to it.
        """
        if params.structured_outputs is None:
            return None
        try:
            if self._grammars is None:
                self._grammars = Grammars(self._tokenizer(), self._model.vocab_size, self._model.eos_token_ids)
            return self._grammars.matcher(params.structured_outputs, request_id)
        except RequestError as error:
            raise RequestError(f"request {request_id!r}: {error}") from error

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer().encode_bare(text)
