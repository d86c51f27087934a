"""Prompts -> token ids of a text encoder that is a chat model: each prompt is a user's turn, in the template of its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np

from dynaip_jax.errors import UserError, reason
from dynaip_jax.families.tokenizers import Tokenizers, check_tokenizer
from dynaip_jax.storage.folders import AnyPath

MARK = "\u27e6prompt\u27e7"  # stands for the prompt where the template is read


class ChatTokenizer(Tokenizers):
    """The tokenizer of a bundle's only text encoder, with its chat template. Picklable; threads may share one."""

    places = "Qwen3"

    def __init__(self, tokenizer: Any, length: int, around: tuple[str, str]):
        """`length`: tokens a prompt; `around`: what the template puts before and after it."""
        self._tokenizers, self._around = {self.places: (tokenizer, length)}, around
        self._lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self._tokenizers[self.places], self._around)

    @classmethod
    def read(cls, folder: AnyPath, length: int, remedy: str = "convert the model again") -> ChatTokenizer:
        """From a folder, in any form that transformers reads. Raises `UserError`, with the `remedy`, if it cannot, or if its chat template is
        missing, fails, or does more with a prompt than put it between two texts."""
        tokenizer = check_tokenizer(folder, remedy)
        expected = "expected a fast tokenizer with a chat template that takes a user's words as they are"
        if not tokenizer.is_fast:
            raise UserError(f"{folder}: has no tokenizer.json; {expected}; {remedy}")
        try:
            text = tokenizer.apply_chat_template(
                [dict(role="user", content=MARK)], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            before, after = text.split(MARK)
        except Exception as e:  # a template of others, run by jinja in its sandbox, raises whatever it likes
            raise UserError(f"{folder}: chat template cannot be used ({reason(e)}); {expected}; {remedy}") from e
        return cls(tokenizer, length, (before, after))

    def ids(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Token ids int32 `[n, t]` of the encoder ("qwen3"), padded to its length: ~id where a token is padding."""
        length = self._tokenizers[self.places][1]
        options = dict(padding="max_length", max_length=length, truncation=True)
        read = self._read(self.places, [self._text(text)[0] for text in texts], **options)
        ids, seen = (np.asarray(read[name], np.int32) for name in ("input_ids", "attention_mask"))
        return dict(qwen3=np.where(seen == 1, ids, ~ids))

    def cut(self, text: str) -> dict[str, str]:
        """Encoder name -> the end of `text`, or of the template after it, that does not fit into it; empty if all of it fits."""
        whole, begin = self._text(text)
        length = self._tokenizers[self.places][1]
        offsets = self._read(self.places, whole, return_offsets_mapping=True)["offset_mapping"]
        if len(offsets) <= length:
            return {}
        start = max(offsets[length][0], begin)
        return {self.places: (whole[start : begin + len(text)] or whole[start:]).strip()}

    def _text(self, prompt: str) -> tuple[str, int]:
        before, after = self._around
        return f"{before}{prompt}{after}", len(before)
