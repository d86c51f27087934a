"""Prompts -> token ids of the two text encoders, with the tokenizers a bundle carries."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynaip_jax.errors import UserError
from dynaip_jax.storage.folders import local_copy

CLIP_LENGTH = 77


class Tokenizers:
    """The T5 and CLIP tokenizers of a bundle. Picklable, so that data workers may hold them."""

    def __init__(self, t5: Any, clip: Any, t5_length: int, clip_length: int = CLIP_LENGTH):
        self._tokenizers = {"T5": (t5, t5_length), "CLIP": (clip, clip_length)}

    def ids(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Token ids int32 `[n, t]` by text encoder ("t5", "clip_text"), padded to its length; FLUX attends to the padding too."""
        return dict(t5=self.t5(texts), clip_text=self.clip(texts))

    @classmethod
    def load(cls, folder: Path, t5_length: int, clip_length: int = CLIP_LENGTH) -> Tokenizers:
        """From `folder/t5` and `folder/clip`, in any form that transformers reads. Raises `UserError` if it cannot."""
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch is as it should be
        from transformers import AutoTokenizer

        loaded = []
        for name in ("t5", "clip"):
            try:
                with local_copy(folder / name) as here:
                    loaded.append(AutoTokenizer.from_pretrained(here, local_files_only=True, trust_remote_code=False))
            except Exception as e:  # transformers raises whatever its backends raise
                reason = str(e).strip().splitlines()[0][:160] if str(e).strip() else type(e).__name__
                raise UserError(
                    f"{folder / name}: not a tokenizer that transformers can read ({reason}); convert the model again"
                ) from e
        return cls(loaded[0], loaded[1], t5_length, clip_length)

    def t5(self, texts: Sequence[str]) -> np.ndarray:
        """Ids `[n, t5_length]`, int32, padded."""
        return self._ids("T5", texts)

    def clip(self, texts: Sequence[str]) -> np.ndarray:
        """Ids `[n, clip_length]`, int32, padded."""
        return self._ids("CLIP", texts)

    def _ids(self, which: str, texts: Sequence[str]) -> np.ndarray:
        tokenizer, length = self._tokenizers[which]
        return np.asarray(
            tokenizer(list(texts), padding="max_length", max_length=length, truncation=True)["input_ids"], np.int32
        )

    def words(self, prompt: str, phrases: Sequence[str]) -> np.ndarray:
        """Where each phrase stands among T5's tokens of `prompt`: weights float32 `[s, t5_length]`, even over its own tokens.

        A phrase is found as whole words, in any case and spacing. Each gets a place of its own, the longest first: the same
        words given twice take their first and their second occurrence. Raises `UserError` for a phrase that is not in the
        prompt, not often enough, or beyond what T5 takes.
        """
        tokenizer, length = self._tokenizers["T5"]
        if not tokenizer.is_fast:
            raise UserError(
                "`words`: the model's T5 tokenizer does not say where its tokens stand; expected one with tokenizer.json; "
                "convert the model again with it, or pass `masks`"
            )
        options = dict(padding="max_length", max_length=length, truncation=True)
        seen, whole = (
            tokenizer(prompt, return_offsets_mapping=True, **kw)["offset_mapping"] for kw in (options, dict())
        )

        def rows(offsets: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
            shared = [prompt[max(a, start) : min(b, end)] for a, b in offsets]
            return [n for n, text in enumerate(shared) if text.strip()]

        weights = np.zeros((len(phrases), length), np.float32)
        taken: list[tuple[int, int]] = []
        for s in sorted(range(len(phrases)), key=lambda s: -len(phrases[s])):
            pattern = r"\s+".join(map(re.escape, phrases[s].split()))
            places = [m.span() for m in re.finditer(rf"(?<!\w){pattern}(?!\w)", prompt, re.IGNORECASE) if pattern]
            free = [(a, b) for a, b in places if all(b <= start or end <= a for start, end in taken)]
            option = f"`words`, subject {s + 1}: its words {phrases[s]!r}"
            if not places:
                raise UserError(f"{option} are not in the prompt; expected words that stand in it; change either")
            if not free:
                raise UserError(
                    f"{option} stand in the prompt {len(places)} time(s), all taken by other subjects; expected a place for "
                    "each; name them all in the prompt, or choose other words"
                )
            taken.append(free[0])
            own = rows(seen, *free[0])
            if len(own) < len(rows(whole, *free[0])):
                raise UserError(
                    f"{option} lie beyond the {length} tokens that T5 takes; shorten the prompt before them"
                )
            weights[s, own] = 1 / len(own)
        return weights

    def cut(self, text: str) -> dict[str, str]:
        """Encoder name -> the end of `text` that does not fit into it; empty if all of it fits."""
        lost = {}
        for which, (tokenizer, length) in self._tokenizers.items():
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            room = length - tokenizer.num_special_tokens_to_add()
            if len(ids) > room:
                lost[which] = tokenizer.decode(ids[room:]).strip()
        return lost
