"""Prompts -> token ids of the two text encoders, with the tokenizers a bundle carries."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynaip_jax.errors import UserError

CLIP_LENGTH = 77


class Tokenizers:
    """The T5 and CLIP tokenizers of a bundle. Picklable, so that data workers may hold them."""

    def __init__(self, t5: Any, clip: Any, t5_length: int, clip_length: int = CLIP_LENGTH):
        self._tokenizers = {"T5": (t5, t5_length), "CLIP": (clip, clip_length)}

    @classmethod
    def load(cls, folder: Path, t5_length: int, clip_length: int = CLIP_LENGTH) -> Tokenizers:
        """From `folder/t5` and `folder/clip`, in any form that transformers reads. Raises `UserError` if it cannot."""
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch is as it should be
        from transformers import AutoTokenizer

        loaded = []
        for name in ("t5", "clip"):
            try:
                loaded.append(
                    AutoTokenizer.from_pretrained(folder / name, local_files_only=True, trust_remote_code=False)
                )
            except Exception as e:  # transformers raises whatever its backends raise
                reason = str(e).strip().splitlines()[0][:160] if str(e).strip() else type(e).__name__
                raise UserError(
                    f"{folder / name}: not a tokenizer that transformers can read ({reason}); convert the model again"
                ) from e
        return cls(loaded[0], loaded[1], t5_length, clip_length)

    def t5(self, texts: Sequence[str]) -> np.ndarray:
        """Ids `[n, t5_length]`, int32, padded; FLUX attends to the padding too."""
        return self._ids("T5", texts)

    def clip(self, texts: Sequence[str]) -> np.ndarray:
        """Ids `[n, clip_length]`, int32, padded."""
        return self._ids("CLIP", texts)

    def _ids(self, which: str, texts: Sequence[str]) -> np.ndarray:
        tokenizer, length = self._tokenizers[which]
        return np.asarray(
            tokenizer(list(texts), padding="max_length", max_length=length, truncation=True)["input_ids"], np.int32
        )

    def cut(self, text: str) -> dict[str, str]:
        """Encoder name -> the end of `text` that does not fit into it; empty if all of it fits."""
        lost = {}
        for which, (tokenizer, length) in self._tokenizers.items():
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            room = length - tokenizer.num_special_tokens_to_add()
            if len(ids) > room:
                lost[which] = tokenizer.decode(ids[room:]).strip()
        return lost
