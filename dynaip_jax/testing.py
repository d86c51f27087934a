"""A tiny bundle and adapter with random weights, in real files: quick, for tests of this project and of yours.

from dynaip_jax.testing import make_adapter, make_bundle

make_bundle(folder / "bundle")
make_adapter(folder / "adapter", folder / "bundle")
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from dynaip_jax.adapters.dynaip import DynaIPConfig, init_adapter_params
from dynaip_jax.families.base import Family
from dynaip_jax.families.registry import FAMILIES, family_of, open_bundle
from dynaip_jax.flow import ScheduleConfig
from dynaip_jax.layers.compute import Compute
from dynaip_jax.models.dino import Dino, DinoConfig
from dynaip_jax.storage.adapter import write_adapter
from dynaip_jax.storage.bundle import NewComponent, write_bundle
from dynaip_jax.storage.codec import to_dict

SEED = 0
SIZE = 128  # pixels
LENGTHS = dict(flux=dict(t5_length=128, clip_length=77), flux2=dict(qwen3_length=128))
STEPS = 8


def tiny_family(name: str = "flux", text: Mapping[str, int] | None = None, **configs: Any) -> Family:
    """A backbone family at tiny sizes; `configs`: of components that are to have others, `text`: token lengths."""
    vocab = _vocabulary()
    words = dict(t5=dict(vocab_size=len(vocab)), clip_text=dict(vocab_size=len(vocab), eos_token_id=vocab["</s>"]))
    words |= dict(qwen3=dict(vocab_size=len(vocab) + len(TURN)))
    kind = FAMILIES[name]
    tiny = {part: c.config.tiny(**words.get(part, {})) for part, c in kind.components.items()} | configs
    lengths = LENGTHS[name] | dict(text or {})
    computes = tuple((part, Compute()) for part in tiny)
    return kind(tuple(tiny.items()), computes, ScheduleConfig(), tuple(lengths.items()))


def make_bundle(path: str | Path, family: str = "flux") -> None:
    """Writes the tiny bundle of a backbone family to the folder `path`."""
    tiny = tiny_family(family)

    def components() -> Iterator[NewComponent]:
        for i, (name, config) in enumerate(tiny.configs):
            init = jax.jit(tiny.init_params, static_argnums=0)
            params = jax.tree.map(np.asarray, init(name, jax.random.fold_in(jax.random.key(SEED), i)))
            yield NewComponent(name, to_dict(config), params, [dict(made_from=f"seed {SEED}")])

    with tempfile.TemporaryDirectory() as folder:
        write_bundle(
            Path(path),
            components(),
            family=family,
            schedule=to_dict(ScheduleConfig()),
            text=dict(tiny.text),
            defaults=dict(steps=STEPS, guidance=3.5, height=SIZE, width=SIZE),
            tokenizers=_tokenizers(Path(folder)) if family == "flux" else dict(qwen3=chat_tokenizer(Path(folder))),
        )


def make_adapter(path: str | Path, bundle: str | Path) -> None:
    """Writes an adapter for the tiny bundle to the folder `path`. What starts at zero in a fresh adapter, and so would change nothing
    (value projections) or show nothing (the router), is random here."""
    base = open_bundle(bundle)
    family = family_of(base)
    vision = family.config("clip_vision")
    n = vision.num_hidden_layers
    config = DynaIPConfig.for_base(
        family.sites,
        vision.hidden_size,
        hmoe=dict(levels=(max(1, n - 2), n - 1, n), expert_width=2 * vision.hidden_size),
        blocks="double",
    )
    params = init_adapter_params(config, jax.random.key(SEED))
    value_key, router_key = jax.random.split(jax.random.key(SEED + 1))
    values, router = params["double"]["value"], params["hmoe"]["router"]["kernel"]
    params["double"]["value"] = jax.random.normal(value_key, values.shape) * values.shape[1] ** -0.5
    params["hmoe"]["router"]["kernel"] = jax.random.normal(router_key, router.shape) * router.shape[0] ** -0.5
    write_adapter(
        Path(path),
        to_dict(config),
        jax.tree.map(np.asarray, params),
        step=0,
        base=dict(family=family.name, fingerprint=base.fingerprint),
        conventions=dict(trained=False),
    )


SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")


def _vocabulary() -> dict[str, int]:
    """Token -> id: the special tokens, then one token a byte."""
    from tokenizers import pre_tokenizers

    return {t: i for i, t in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}


TURN = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is false %}<think>

</think>

{% endif %}{% endif -%}"""


def chat_tokenizer(folder: Path) -> Path:
    """`folder`, with a byte-level tokenizer in it that has a chat template of Qwen3's kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = _vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab | {t: len(vocab) + i for i, t in enumerate(TURN)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL, *TURN])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", pad_token="<pad>", chat_template=TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def make_clip_tokenizer(folder: Path) -> Path:
    """`folder`, made, with a byte-level tokenizer in it that marks both ends of a text, as CLIP's does."""
    return _byte_tokenizer(folder, "<s> $A </s>")


def _tokenizers(folder: Path) -> dict[str, Path]:
    """Those of both text encoders, in the form that transformers reads."""
    return dict(t5=_byte_tokenizer(folder / "t5", "$A </s>"), clip=make_clip_tokenizer(folder / "clip"))


def _byte_tokenizer(folder: Path, template: str) -> Path:
    """`folder`, made, with a tokenizer in it that has a token a byte and no merges; `template`: where its marks stand."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocab = _vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(t, vocab[t]) for t in ("<s>", "</s>")]
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def make_dino(path: str | Path, **changes: Any) -> None:
    """Writes a DINO of random weights, as a measure of `dynaip evaluate set`, to the folder `path`; `changes`: of its config."""
    config = DinoConfig.tiny(**changes)
    inputs = {name: np.zeros(x.shape, x.dtype) for name, x in Dino.inputs_spec(config).items()}
    params = nn.meta.unbox(jax.jit(Dino(config).init)(jax.random.key(SEED), **inputs)["params"])
    params = jax.tree.map(np.asarray, params)
    parts = [NewComponent("dino", to_dict(config), params, [dict(made_from=f"seed {SEED}")])]
    write_bundle(Path(path), parts, family="dino", schedule={}, text={}, defaults={}, tokenizers={})
