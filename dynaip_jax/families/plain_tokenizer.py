"""The simplest kind of tokenizer that transformers reads, without transformers, which takes a second to import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

KIND = "PreTrainedTokenizerFast"
FILES = {"tokenizer.json", "tokenizer_config.json"}
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class PlainTokenizer:
    """What `transformers.PreTrainedTokenizerFast` makes of `tokenizer.json` and of settings that name special tokens alone, as far as
    `families.tokenizers` asks. Pads on the right; cuts off the end. Picklable."""

    is_fast = True

    def __init__(self, core: Tokenizer, special: Mapping[str, str]):
        self._core, self._pad = core, special.get("pad_token")
        core.add_special_tokens(list(dict.fromkeys(special[name] for name in SPECIAL if name in special)))
        unknown = special.get("unk_token")
        self.unk_token_id = None if unknown is None else core.token_to_id(unknown)

    @staticmethod
    def reads(folder: Path, settings: Mapping[str, Any]) -> bool:
        """Whether a folder holds nothing that is beyond it: no other files, such as chat templates, and in its `settings` nothing but special tokens."""
        tokens = {name: value for name, value in settings.items() if name != "tokenizer_class"}
        plain = all(name in SPECIAL and isinstance(value, str) for name, value in tokens.items())
        return settings.get("tokenizer_class") == KIND and plain and FILES == {path.name for path in folder.iterdir()}

    @classmethod
    def read(cls, folder: Path, settings: Mapping[str, Any]) -> PlainTokenizer:
        """From a folder that `reads` takes. Raises whatever tokenizers raises of a file that is none."""
        special = {name: value for name, value in settings.items() if name in SPECIAL}
        return cls(Tokenizer.from_file(str(folder / "tokenizer.json")), special)

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: str | None = None,
        max_length: int | None = None,
        truncation: bool = False,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
    ) -> dict[str, Any]:
        """`input_ids` of a text, or of each of several; `offset_mapping`, (first, end) of each token's letters, if asked for. `padding`:
        "max_length" or None. Raises `ValueError` for a tokenizer that names no padding and is to pad."""
        self._core.no_padding()
        self._core.no_truncation()
        if truncation and max_length is not None:
            self._core.enable_truncation(max_length)
        if padding is not None:
            if self._pad is None:
                raise ValueError("it names no token to pad with")
            self._core.enable_padding(length=max_length, pad_id=self._core.token_to_id(self._pad), pad_token=self._pad)
        one = isinstance(text, str)
        found = self._core.encode_batch([text] if one else list(text), add_special_tokens=add_special_tokens)
        columns: dict[str, list[Any]] = dict(input_ids=[x.ids for x in found])
        if return_offsets_mapping:
            columns["offset_mapping"] = [x.offsets for x in found]
        return {name: column[0] if one else column for name, column in columns.items()}

    def num_special_tokens_to_add(self) -> int:
        """How many tokens are added to a text."""
        return self._core.num_special_tokens_to_add(is_pair=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens too."""
        return self._core.decode(list(ids), skip_special_tokens=False)
