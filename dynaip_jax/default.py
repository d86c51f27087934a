"""The embedded default: a tiny FLUX-family bundle and adapter with random weights, made on the spot from a fixed seed.

It goes through the same files and loaders as a real model, and shows the way from prompt to PNG; what it draws is texture.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from dynaip_jax.version import __version__

ASSETS = Path(__file__).parent / "assets" / "shapeland"  # what `train/shapeland.py` ships
JUDGE = ASSETS / "judge.safetensors"
RETRAINED = ASSETS / "retrained.json"  # rows of adapters that were trained differently

SEED = 0
SIZE = 128  # pixels
STEPS = 8


def cache_folder() -> Path:
    """Where this version keeps what it makes on the spot."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynaip_jax" / f"tiny-{__version__}"


def paths() -> tuple[Path, Path]:
    """The bundle's and the adapter's folder, in the user's cache; made at the first call (seconds)."""
    bundle, adapter = cache_folder() / "bundle", cache_folder() / "adapter"
    if not bundle.exists():
        make_bundle(bundle)
    if not adapter.exists():
        make_adapter(adapter, bundle)
    return bundle, adapter


def make_bundle(path: Path, overwrite: bool = False) -> None:
    """Writes the tiny bundle."""
    import jax
    import numpy as np

    from dynaip_jax.bundle import NewComponent, write_bundle
    from dynaip_jax.flow import ScheduleConfig
    from dynaip_jax.models.registry import COMPONENTS, config_to_dict, init_params

    vocab = _vocabulary()
    words = dict(t5=dict(vocab_size=len(vocab)), clip_text=dict(vocab_size=len(vocab), eos_token_id=vocab["</s>"]))
    configs = {name: c.config.tiny(**words.get(name, {})) for name, c in COMPONENTS.items()}

    def components() -> Iterator[NewComponent]:
        for i, (name, config) in enumerate(configs.items()):
            params = jax.jit(lambda key, n=name, c=config: init_params(n, c, key))(
                jax.random.fold_in(jax.random.key(SEED), i)
            )
            yield NewComponent(
                name, config_to_dict(config), jax.tree.map(np.asarray, params), [dict(made_from=f"seed {SEED}")]
            )

    with tempfile.TemporaryDirectory() as folder:
        write_bundle(
            path,
            components(),
            family="flux",
            schedule=asdict(ScheduleConfig()),
            overwrite=overwrite,
            text=dict(t5_length=128, clip_length=configs["clip_text"].max_position_embeddings),
            defaults=dict(steps=STEPS, guidance=3.5, height=SIZE, width=SIZE),
            tokenizers=_tokenizers(Path(folder)),
        )


def make_adapter(path: Path, bundle: Path, overwrite: bool = False) -> None:
    """Writes an adapter for the tiny bundle. What starts at zero in a fresh adapter, and so would change nothing (value
    projections) or show nothing (the router), is random here."""
    import jax
    import numpy as np

    from dynaip_jax.adapter.dynaip import DynaIPConfig, adapter_to_dict, init_adapter_params
    from dynaip_jax.bundle import Bundle, write_adapter
    from dynaip_jax.models.registry import COMPONENTS, FAMILIES

    base = Bundle.open(bundle, FAMILIES)
    vision = base.config("clip_vision", COMPONENTS["clip_vision"].config)
    n = vision.num_hidden_layers
    config = DynaIPConfig.for_base(
        base.config("transformer", COMPONENTS["transformer"].config),
        vision.hidden_size,
        hmoe=dict(levels=(max(1, n - 2), n - 1, n), expert_width=2 * vision.hidden_size),
    )
    params = init_adapter_params(config, jax.random.key(SEED))
    value_key, router_key = jax.random.split(jax.random.key(SEED + 1))
    values, router = params["double"]["value"], params["hmoe"]["router"]["kernel"]
    params["double"]["value"] = jax.random.normal(value_key, values.shape) * values.shape[1] ** -0.5
    params["hmoe"]["router"]["kernel"] = jax.random.normal(router_key, router.shape) * router.shape[0] ** -0.5
    write_adapter(
        path,
        adapter_to_dict(config),
        jax.tree.map(np.asarray, params),
        step=0,
        overwrite=overwrite,
        base=dict(family=base.manifest["family"], fingerprint=base.fingerprint),
        conventions=dict(trained=False),
    )


SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")


def _vocabulary() -> dict[str, int]:
    """Token -> id: the special tokens, then one token a byte."""
    from tokenizers import pre_tokenizers

    return {t: i for i, t in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}


def _tokenizers(folder: Path) -> dict[str, Path]:
    """Byte-level tokenizers, without merges, in the form that transformers reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocab = _vocabulary()
    found = {}
    for name, template in (("t5", "$A </s>"), ("clip", "<s> $A </s>")):
        tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(list(SPECIAL))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(t, vocab[t]) for t in ("<s>", "</s>")]
        )
        found[name] = folder / name
        found[name].mkdir()
        tokenizer.save(str(found[name] / "tokenizer.json"))
        config = dict(tokenizer_class="PreTrainedTokenizerFast", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
        (found[name] / "tokenizer_config.json").write_text(json.dumps(config))
    return found
