"""A tiny FLUX-family bundle and adapter with random weights, in real files: quick, and without a meaning to preserve."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np

from dynaip_jax.adapters.dynaip import DynaIPConfig, adapter_to_dict, init_adapter_params
from dynaip_jax.families.registry import COMPONENTS, FAMILIES, config_to_dict, init_params
from dynaip_jax.flow import ScheduleConfig
from dynaip_jax.storage.bundle import Bundle, NewComponent, write_adapter, write_bundle

SEED = 0
SIZE = 128  # pixels
STEPS = 8


def make_bundle(path):
    """Writes the tiny bundle."""
    vocab = _vocabulary()
    words = dict(t5=dict(vocab_size=len(vocab)), clip_text=dict(vocab_size=len(vocab), eos_token_id=vocab["</s>"]))
    configs = {name: c.config.tiny(**words.get(name, {})) for name, c in COMPONENTS.items()}

    def components():
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
            text=dict(t5_length=128, clip_length=configs["clip_text"].max_position_embeddings),
            defaults=dict(steps=STEPS, guidance=3.5, height=SIZE, width=SIZE),
            tokenizers=_tokenizers(Path(folder)),
        )


def make_adapter(path, bundle):
    """Writes an adapter for the tiny bundle. What starts at zero in a fresh adapter, and so would change nothing (value
    projections) or show nothing (the router), is random here."""
    base = Bundle.open(bundle, FAMILIES)
    vision = base.config("clip_vision", COMPONENTS["clip_vision"].config)
    n = vision.num_hidden_layers
    config = DynaIPConfig.for_base(
        base.config("transformer", COMPONENTS["transformer"].config),
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
        path,
        adapter_to_dict(config),
        jax.tree.map(np.asarray, params),
        step=0,
        base=dict(family=base.manifest["family"], fingerprint=base.fingerprint),
        conventions=dict(trained=False),
    )


SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")


def _vocabulary():
    """Token -> id: the special tokens, then one token a byte."""
    from tokenizers import pre_tokenizers

    return {t: i for i, t in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}


def _tokenizers(folder):
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
