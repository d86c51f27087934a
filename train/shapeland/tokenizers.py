"""Whole-word tokenizers of Shapeland's vocabulary."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from dynaip_jax.families.tokenizers import Tokenizers
from train.shapeland.configs import SPECIAL, TOKENS, WORDS

TEMPLATES = dict(t5="$A </s>", clip="<s> $A </s>")


def write_tokenizers(folder: Path) -> dict[str, Path]:
    """Writes both tokenizers in the form that transformers reads -> their folders, `folder`/t5 and `folder`/clip."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocab = {word: n for n, word in enumerate(WORDS)}
    config = dict(tokenizer_class="PreTrainedTokenizerFast", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    folders = {}
    for name, template in TEMPLATES.items():
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="removed")]
        )
        tokenizer.add_special_tokens(list(SPECIAL))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(t, vocab[t]) for t in ("<s>", "</s>")]
        )
        folders[name] = folder / name
        folders[name].mkdir(parents=True)
        tokenizer.save(str(folders[name] / "tokenizer.json"))
        (folders[name] / "tokenizer_config.json").write_text(json.dumps(config))
    return folders


def load_tokenizers() -> Tokenizers:
    """The tokenizers, ready to use."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizers(Path(folder))
        return Tokenizers.load(Path(folder), **TOKENS)
