"""Prompts -> token ids of the two text encoders, with the tokenizers a bundle carries."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from dynaip_jax import reading
from dynaip_jax.errors import UserError, reason
from dynaip_jax.families.plain_tokenizer import KIND, PlainTokenizer
from dynaip_jax.families.words import choose, overlap
from dynaip_jax.storage.folders import AnyPath, local_copy

CLIP_LENGTH = 77
STRANGE = "\ue000"  # for private use: in no vocabulary
CLASSES = (
    "T5Tokenizer",
    "CLIPTokenizer",
    "Qwen2Tokenizer",
    "PreTrainedTokenizer",
    "TokenizersBackend",
)  # of transformers, with "Fast" or without


def check_tokenizer(folder: AnyPath, remedy: str = "download the model again") -> Any:
    """The tokenizer in a folder, as transformers reads it, tried on a word and on what is none. Nothing that the folder holds is run.

    Raises `UserError`, with the `remedy`, for one that wants code of its own, that is of another kind, or cannot be read.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch is as it should be
    names = [n for n in ("tokenizer_config.json", "config.json") if reading.exists(folder / n)]
    settings = {name: _settings(folder / name, remedy) for name in names}
    try:
        with local_copy(folder) as here:
            tokenizer = _read(here, settings.get("tokenizer_config.json", {}))
        ids = tokenizer(["a", STRANGE], padding="max_length", max_length=8, truncation=True)["input_ids"]
        if np.asarray(ids, np.int32).shape != (2, 8):
            raise ValueError("it does not pad")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # transformers raises whatever its backends raise; a panic of theirs is no Exception
        raise UserError(f"{folder}: not a tokenizer that transformers can read ({reason(e)}); {remedy}") from e
    return tokenizer


def _read(folder: Path, settings: Mapping[str, Any]) -> Any:
    """The tokenizer in a folder with these settings, by what is needed and no more: transformers imports for a second, `AutoTokenizer`, which
    would find the class by itself, for two."""
    if PlainTokenizer.reads(folder, settings):
        return PlainTokenizer.read(folder, settings)
    import transformers

    kind: Any = getattr(transformers, KIND if settings.get("tokenizer_class") == KIND else "AutoTokenizer")
    return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _settings(path: AnyPath, remedy: str) -> dict[str, Any]:
    """A file of settings, which names a class that is known, or none."""
    config = reading.read_json(path, expected="a tokenizer's settings", remedy=remedy)
    if "auto_map" in config:
        raise UserError(
            f"{path}: asks for code of its own (auto_map), which is never run; expected a tokenizer of a text encoder; {remedy}"
        )
    kind = config.get("tokenizer_class")
    if kind is not None and (not isinstance(kind, str) or kind.removesuffix("Fast") not in CLASSES):
        raise UserError(f"{path}: tokenizer_class {kind!r}; expected one of {', '.join(CLASSES)}; {remedy}")
    return config


class Tokenizers:
    """The T5 and CLIP tokenizers of a bundle. Picklable, so that data workers may hold them; threads may share one."""

    places = "T5"  # the encoder whose tokens are the backbone's text rows

    def __init__(self, t5: Any, clip: Any, t5_length: int, clip_length: int = CLIP_LENGTH):
        self._tokenizers = {"T5": (t5, t5_length), "CLIP": (clip, clip_length)}
        self._lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        (t5, t5_length), (clip, clip_length) = self._tokenizers.values()
        return type(self), (t5, clip, t5_length, clip_length)

    def _read(self, which: str, text: str | list[str], **options: Any) -> Any:
        """What a tokenizer makes of `text`. It pads and cuts as its last caller said, of whatever thread: one at a time."""
        with self._lock:
            return self._tokenizers[which][0](text, **options)

    def ids(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Token ids int32 `[n, t]` by text encoder ("t5", "clip_text"), padded to its length; FLUX attends to the padding too."""
        return dict(t5=self.t5(texts), clip_text=self.clip(texts))

    @classmethod
    def load(cls, folder: Path, t5_length: int, clip_length: int = CLIP_LENGTH) -> Tokenizers:
        """From `folder/t5` and `folder/clip`, in any form that transformers reads. Raises `UserError` if it cannot."""
        remedy = "convert the model again"
        loaded = [check_tokenizer(folder / name, remedy) for name in ("t5", "clip")]
        return cls(loaded[0], loaded[1], t5_length, clip_length)

    def t5(self, texts: Sequence[str]) -> np.ndarray:
        """Ids `[n, t5_length]`, int32, padded."""
        return self._ids("T5", texts)

    def clip(self, texts: Sequence[str]) -> np.ndarray:
        """Ids `[n, clip_length]`, int32, padded."""
        return self._ids("CLIP", texts)

    def _text(self, prompt: str) -> tuple[str, int]:
        """What the encoder of `places` reads of a prompt, and where in it the prompt begins."""
        return prompt, 0

    def _ids(self, which: str, texts: Sequence[str]) -> np.ndarray:
        options = dict(padding="max_length", max_length=self._tokenizers[which][1], truncation=True)
        return np.asarray(self._read(which, list(texts), **options)["input_ids"], np.int32)

    def words(self, prompt: str, phrases: Sequence[str]) -> np.ndarray:
        """Where each phrase stands among the tokens of `prompt` that are text rows: weights float32 `[s, t]`, even over its own tokens.

        Each gets a place of its own, as `families.words.choose` finds it. Raises `UserError` for a phrase that is not in the
        prompt, not often enough, or beyond what the encoder takes.
        """
        tokenizer, length = self._tokenizers[self.places]
        if not tokenizer.is_fast:
            raise UserError(
                f"`words`: the model's {self.places} tokenizer does not say where its tokens stand; expected one with tokenizer.json; "
                "convert the model again with it, or pass `masks`"
            )
        options = dict(padding="max_length", max_length=length, truncation=True)
        text, begin = self._text(prompt)
        seen, whole = (
            self._read(self.places, text, return_offsets_mapping=True, **kw)["offset_mapping"]
            for kw in (options, dict())
        )

        def rows(offsets: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
            shared = [text[max(a, begin + start) : min(b, begin + end)] for a, b in offsets]
            return [n for n, part in enumerate(shared) if part.strip()]

        weights = np.zeros((len(phrases), length), np.float32)
        for s, place in enumerate(choose(prompt, phrases)):
            own = rows(seen, *place)
            if len(own) < len(rows(whole, *place)):
                raise UserError(
                    f"`words`, subject {s + 1}: its words {phrases[s]!r} lie beyond the {length} tokens that {self.places} "
                    "takes; shorten the prompt before them"
                )
            weights[s, own] = 1 / len(own)
        return weights

    def unknown(self, text: str) -> dict[str, list[str]]:
        """Encoder name -> the words of `text` that it has no tokens for; empty if it has."""
        strange = {}
        for which in self._tokenizers:
            if words := self._unknown(which, text):
                strange[which] = words
        return strange

    def _unknown(self, which: str, text: str) -> list[str]:
        """The words of `text`, each once, that become the token for unknown ones."""
        tokenizer = self._tokenizers[which][0]
        if tokenizer.is_fast:
            encoded = self._read(which, text, return_offsets_mapping=True, add_special_tokens=False)
            tokens = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            spans = [span for token, span in tokens if token == tokenizer.unk_token_id]
            words = [
                word[0]
                for word in re.finditer(r"\w+|[^\w\s]+", text)
                if any(overlap(word.span(), span) for span in spans)
            ]
        else:
            pieces = tokenizer.tokenize(text)
            tokens = zip(pieces, tokenizer.convert_tokens_to_ids(pieces), strict=True)
            words = [piece.strip("\u2581") for piece, token in tokens if token == tokenizer.unk_token_id]
        return list(dict.fromkeys(words))

    def cut(self, text: str) -> dict[str, str]:
        """Encoder name -> the end of `text` that does not fit into it; empty if all of it fits."""
        lost = {}
        for which, (tokenizer, length) in self._tokenizers.items():
            ids = self._read(which, text, add_special_tokens=False)["input_ids"]
            room = length - tokenizer.num_special_tokens_to_add()
            if len(ids) > room:
                lost[which] = tokenizer.decode(ids[room:]).strip()
        return lost
