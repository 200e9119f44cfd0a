"""Text to token ids and back, with the tokenizer that came with the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream

from multibatch.errors import RequestError


class Tokenizer:
    """A transformers fast tokenizer, as the runtime uses it."""

    def __init__(self, folder: Path) -> None:
        """Loads the tokenizer files of `folder`."""
        from transformers import AutoTokenizer

        self.hf: Any = AutoTokenizer.from_pretrained(folder)

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with the special tokens that the model's tokenizer adds."""
        ids: list[int] = self.hf(text)["input_ids"]
        return ids

    def encode_bare(self, text: str) -> list[int]:
        """Ids of a piece of text, without special tokens."""
        ids: list[int] = self.hf(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of several tokens together."""
        text: str = self.hf.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def decode_token(self, token_id: int) -> str:
        """The text of one token alone."""
        text: str = self.hf.decode([token_id])
        return text

    def render_chat(self, messages: Sequence[Mapping[str, Any]], template: str | None, **options: Any) -> list[int]:
        """Ids of a conversation in the model's chat template.

        Raises:
            RequestError: the tokenizer has no template and none is given.
        """
        if template is None and not self.hf.chat_template:
            raise RequestError("the model's tokenizer has no chat template; give chat_template=…, or use generate()")
        text: str = self.hf.apply_chat_template(
            [dict(m) for m in messages], chat_template=template, tokenize=False, **options
        )
        ids: list[int] = self.hf(text, add_special_tokens=False)["input_ids"]
        return ids


class TokenizerFolder:
    """Where an artifact has its tokenizer, if it has one. It is loaded at first use, since prompts of ids need none."""

    def __init__(self, folder: Path) -> None:
        """Reads nothing yet."""
        self._folder = folder
        self.exists = folder.is_dir()
        self._tokenizer: Tokenizer | None = None

    def get(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            RequestError: the artifact has none.
        """
        if not self.exists:
            raise RequestError("the artifact has no tokenizer; give prompts as token ids, with detokenize=False")
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self._folder)
        return self._tokenizer


class Detokenizer:
    """Turns one sequence's output ids into text as they come, and finds its stop strings."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], skip_special_tokens: bool) -> None:
        """Starts with an empty text."""
        self._backend = tokenizer.hf.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._stop = list(stop)
        self._held_back = max((len(s) for s in self._stop), default=1) - 1
        self.text = ""

    def add(self, token_id: int) -> str | None:
        """Appends a token's text; the stop string that now occurs first in the text, or None."""
        piece = self._stream.step(self._backend, token_id) or ""
        # A match ends in the new piece, so it starts at most that much before it.
        start = max(0, len(self.text) - self._held_back)
        self.text += piece
        found = [(place, s) for s in self._stop if (place := self.text.find(s, start)) >= 0]
        return min(found)[1] if found else None

    def cut(self, stop: str, keep: bool) -> None:
        """Ends the text at `stop`, which stays only if `keep`."""
        place = self.text.find(stop)
        self.text = self.text[: place + len(stop) if keep else place]

    def visible(self, finished: bool) -> str:
        """What may be shown: while unfinished, not the tail that could become a stop string."""
        if finished or not self._held_back:
            return self.text
        return self.text[: -self._held_back]
