"""The readers of files, each with a small good file, a way to hurt it, and what may be read of it then."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.mutation import lists
from tests.mutation.mutants import damaged_bytes, damaged_json

warnings.simplefilter("ignore")


def digest(tree: Any) -> str:
    """Names, dtypes, shapes and bytes of a tree of arrays and plain values."""
    import jax

    whole = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)
    for path, leaf in sorted((jax.tree_util.keystr(path), leaf) for path, leaf in leaves):
        x = np.asarray(leaf)
        whole.update(f"{path} {x.dtype} {x.shape} ".encode())
        whole.update(str(leaf).encode(errors="surrogatepass") if x.dtype.hasobject else x.tobytes())
    return whole.hexdigest()


class Reader:
    """`make` writes good files into a folder, `mutate` hurts a copy of them, `read` gives what is compared; `different` says what is
    wrong with a mutant that was read otherwise than the good file, None if that is what it says."""

    files: tuple[str, ...] = ()  # patterns of those that are hurt
    own: tuple[Any, ...] = ()

    def make(self, folder: Path) -> None:
        raise NotImplementedError

    def read(self, folder: Path) -> Any:
        raise NotImplementedError

    def mutate(self, rng: random.Random, good: Path, folder: Path) -> None:
        files = sorted(p for pattern in self.files for p in good.glob(pattern) if p.is_file())
        file = rng.choice(files)
        data = file.read_bytes()
        is_json = file.suffix == ".json" and data[:1] in (b"{", b"[")
        hurt = damaged_json(rng, data, self.own) if is_json else damaged_bytes(rng, data)
        target = folder / file.relative_to(good)
        if rng.random() < 0.01:
            target.unlink()
        else:
            target.write_bytes(hurt)

    def different(self, folder: Path, found: Any) -> str | None:
        return "read otherwise than before"

    def place(self, good: Path, folder: Path) -> Path:
        """A fresh copy of the good files, to be hurt."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        return folder


class Safetensors(Reader):
    """A file of weights; what is read must be what the format's own library reads."""

    files = ("*.safetensors",)

    def make(self, folder):
        import ml_dtypes
        from safetensors.numpy import save_file

        rng = np.random.default_rng(0)
        tensors = {
            f"block.{n}.weight": rng.normal(size=(2, 3)).astype(kind) for n, kind in enumerate((np.float32, np.float16))
        }
        tensors |= {"scale": np.ones((), np.float32), "none": np.zeros((0, 4), np.float32)}
        tensors |= {"half": rng.normal(size=4).astype(ml_dtypes.bfloat16)}
        save_file(tensors, folder / "a.safetensors", metadata=dict(note='{"made": [1, "x"]}'))

    def mutate(self, rng, good, folder):
        data = (good / "a.safetensors").read_bytes()
        if rng.random() < 0.3:
            (folder / "a.safetensors").write_bytes(damaged_bytes(rng, data))
            return
        length = int.from_bytes(data[:8], "little")
        own = ("F8_E4M3", "F8_E5M2", "I64", "I32", "U8", "BOOL", "F4", "C64", "F64", "BF16", "F16", "f32")
        header = data[8 : 8 + length].rstrip(b" ")
        if rng.random() < 0.2:  # a dtype of the same size, so that all else fits
            header = header.replace(
                *rng.choice(((b"F32", b"I32"), (b"F32", b"U32"), (b"F16", b"I16"), (b"F16", b"U16"), (b"F32", b"F3")))
            )
        else:
            header = damaged_json(rng, header, own)
        if rng.random() < 0.1:
            header = rng.choice((b" ", b"\n", b"\xef\xbb\xbf", b"[]")) + header
        if rng.random() < 0.3:
            header += rng.choice((b" ", b"\0", b"\n", b" " * (-len(header) % 8)))
        size = len(header) if rng.random() < 0.9 else max(0, len(header) + rng.choice((-1, 1, 8)))
        (folder / "a.safetensors").write_bytes(size.to_bytes(8, "little") + header + data[8 + length :])

    def read(self, folder):
        from dynaip_jax.storage.manifest import flatten
        from dynaip_jax.storage.tensors import read_tree

        return {
            name: (str(x.dtype), x.shape, x.tobytes())
            for name, x in flatten(read_tree(folder / "a.safetensors")).items()
        }

    def different(self, folder, found):
        from safetensors import SafetensorError, deserialize

        names = dict(F32="float32", F16="float16", BF16="bfloat16", F64="float64")
        try:
            stated = deserialize((folder / "a.safetensors").read_bytes())
        except SafetensorError as e:
            return f"the library refuses it: {e}"
        known = {name: (names.get(t["dtype"]), tuple(t["shape"]), bytes(t["data"])) for name, t in stated}
        return None if known == found else "the library reads other tensors"


class Index(Reader):
    """A sharded set and its index."""

    files = ("*.json", "*.json", "*.json", "*.safetensors")
    own = ("b.safetensors", "c.safetensors", "./a.safetensors", "../index/a.safetensors", "x" * 300 + ".safetensors")

    def make(self, folder):
        from safetensors.numpy import save_file

        save_file({"x": np.ones(3, np.float32), "y": np.zeros(2, np.float32)}, folder / "a.safetensors")
        save_file({"z": np.full((2, 2), 7, np.float32)}, folder / "b.safetensors")
        where = dict(x="a.safetensors", y="a.safetensors", z="b.safetensors")
        (folder / "m.safetensors.index.json").write_text(
            json.dumps(dict(metadata=dict(total_size=36), weight_map=where))
        )

    def read(self, folder):
        from dynaip_jax.storage.tensors import TensorFile

        file = TensorFile(folder / "m.safetensors.index.json")
        return {name: (str(file[name].dtype), file.shape(name), file[name].tobytes()) for name in file}

    def different(self, folder, found):
        shards = Safetensors()
        try:
            known: dict[str, Any] = {}
            stated = json.loads((folder / "m.safetensors.index.json").read_text())["weight_map"]
            for name in set(stated.values()):  # a shard that it does not name is none of the set
                (folder / "one").mkdir(exist_ok=True)
                (folder / "one" / "a.safetensors").write_bytes((folder / name).read_bytes())
                known |= shards.read(folder / "one")
        except Exception as e:
            return f"a shard cannot be read: {e}"
        return None if known == found else "not what the shards hold"


def make_models(folder: Path, *, adapter: bool) -> None:
    """A tiny bundle and, if asked for, an adapter for it, of numbers that no program has to be compiled for."""
    import jax

    from dynaip_jax.adapters.dynaip import DynaIPConfig, abstract_adapter_params
    from dynaip_jax.flow import ScheduleConfig
    from dynaip_jax.storage.adapter import write_adapter
    from dynaip_jax.storage.bundle import NewComponent, write_bundle
    from dynaip_jax.storage.codec import to_dict
    from dynaip_jax.storage.manifest import fingerprint
    from dynaip_jax.testing import _tokenizers, tiny_family

    family, rng = tiny_family(), np.random.default_rng(0)

    def numbers(tree: Any) -> Any:
        return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), tree)

    params = {name: numbers(family.abstract_params(name)) for name, _ in family.configs}
    parts = [
        NewComponent(name, to_dict(config), params[name], [dict(made_from="numbers")])
        for name, config in family.configs
    ]
    defaults = dict(steps=8, guidance=3.5, height=128, width=128)
    facts = dict(family=family.name, schedule=to_dict(ScheduleConfig()), text=dict(family.text), defaults=defaults)
    (folder / "words").mkdir()
    write_bundle(folder / "bundle", parts, **facts, tokenizers=_tokenizers(folder / "words"))
    shutil.rmtree(folder / "words")
    if adapter:
        clip = family.config("clip_vision")
        config = DynaIPConfig.for_base(
            family.sites, clip.hidden_size, hmoe=dict(levels=(2, 3, 4), expert_width=64), blocks="double"
        )
        weights = numbers(abstract_adapter_params(config))
        base = dict(family=family.name, fingerprint=fingerprint(params["transformer"]))
        write_adapter(folder / "adapter", to_dict(config), weights, base=base, step=0, conventions=dict(trained=False))


class AdapterFile(Reader):
    """`adapter.json`: its config is the one that the file states, and fits the weights."""

    files = ("adapter/adapter.json",)
    own = ("double", "single", "concat", "after_rope", "residual", [0, 0, 1], [1, 2, 3], 10**6)

    def make(self, folder):
        make_models(folder, adapter=True)

    @lru_cache(maxsize=4)  # noqa: B019
    def _family(self, bundle: Path):
        from dynaip_jax.families.registry import family_of, open_bundle

        opened = open_bundle(bundle)
        return opened, family_of(opened)

    @lru_cache(maxsize=4)  # noqa: B019
    def _target(self, config: Any):
        import flax.linen as nn

        from dynaip_jax.adapters.dynaip import abstract_adapter_params
        from dynaip_jax.runtime.sharding import on_one_device

        return on_one_device(nn.meta.unbox(abstract_adapter_params(config, boxed=True)))

    def read(self, folder):
        from dynaip_jax.sampling.opening import read_adapter_config
        from dynaip_jax.storage.adapter import read_adapter_weights

        opened, family = self._family(folder.parent / folder.name.removesuffix("-mutant") / "bundle")
        config = read_adapter_config(folder / "adapter", opened, family, False)
        return repr(config), digest(read_adapter_weights(folder / "adapter", self._target(config)))

    def different(self, folder, found):
        from dynaip_jax.adapters.dynaip import DynaIPConfig
        from dynaip_jax.storage.codec import from_dict

        stated = json.loads((folder / "adapter" / "adapter.json").read_text())["config"]
        return None if found[0] == repr(from_dict(DynaIPConfig, stated)) else "another config than the file's"


class AdapterWeights(AdapterFile):
    """`adapter.safetensors`, whose checksum is in `adapter.json`."""

    files = ("adapter/adapter.safetensors",)

    def different(self, folder, found):
        return "other weights"


class BundleFile(Reader):
    """`bundle.json`: a family that can be built."""

    files = ("bundle/bundle.json",)
    own = ("flux", 10**6, 4096, 64, [4, 6, 6])

    def make(self, folder):
        make_models(folder, adapter=False)

    @lru_cache(maxsize=2)  # noqa: B019
    def _shapes(self, family: Any):
        return {name: family.abstract_params(name) for name, _ in family.configs}

    def read(self, folder):
        from dynaip_jax.families.registry import family_of, open_bundle
        from dynaip_jax.sampling.options import SampleOptions

        opened = open_bundle(folder / "bundle")
        family = family_of(opened)
        used = SampleOptions().filled(
            opened.manifest["defaults"], multiple=family.multiple, takes_guidance=family.takes_guidance
        )
        family.times(used.steps or 1, 16)
        shapes = self._shapes(family)
        return repr(family), repr(used), str({k: (v.shape, v.dtype) for k, v in _leaves(shapes)})

    def different(self, folder, found):
        stated = json.loads((folder / "bundle" / "bundle.json").read_text())
        return None if isinstance(stated["components"], dict) else "a bundle without components"


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    import jax

    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


class BundleFolder(BundleFile):
    """The files of weights and tokenizers, whose checksums are in `bundle.json`."""

    files = ("bundle/clip_text/**/*", "bundle/tokenizers/**/*")
    checks = True

    def make(self, folder):
        super().make(folder)
        if not self.checks:
            path = folder / "bundle" / "bundle.json"
            stated = json.loads(path.read_text())
            del stated["checksums"]
            path.write_text(json.dumps(stated))

    @lru_cache(maxsize=1)  # noqa: B019
    def _target(self):
        from dynaip_jax.families.flux import Flux1
        from dynaip_jax.families.registry import open_bundle
        from dynaip_jax.runtime.sharding import on_one_device

        component = Flux1.components["clip_text"]
        return on_one_device(component.abstract(open_bundle(self._first).config("clip_text", component.config)))

    def read(self, folder):
        from dynaip_jax.families.registry import open_bundle
        from dynaip_jax.families.tokenizers import Tokenizers

        self._first = getattr(self, "_first", folder / "bundle")
        opened = open_bundle(folder / "bundle")
        weights = digest(opened.load("clip_text", self._target()))
        words = Tokenizers.load(opened.part("tokenizers"), **opened.manifest["text"]).ids(["a star on grass"])
        return weights, digest(words)

    def different(self, folder, found):
        return "other weights or tokens" if self.checks else None


class OldBundleFolder(BundleFolder):
    """The same of a bundle without checksums, where damage can go unnoticed."""

    checks = False


class Configs(Reader):
    """The configs of a diffusers folder, and whether tables can be made of them."""

    component = ""

    def make(self, folder):
        from safetensors.numpy import save_file

        from tools.convert_torch_weights.engine import source_shapes

        place = folder / self.component
        place.mkdir()
        config, table, stem = self.good()
        (place / "config.json").write_text(json.dumps(config))
        shapes = source_shapes(table)
        save_file({n: np.zeros(s, np.float32) for n, s in shapes.items()}, place / f"{stem}.safetensors")

    def good(self) -> tuple[dict, Any, str]:
        raise NotImplementedError

    def folder(self) -> Any:
        from tools.convert_torch_weights.flux_layout import LAYOUT

        return next(f for f in LAYOUT.folders.values() if f.name == self.component)

    @property
    def files(self):  # type: ignore[override]
        return (f"{self.component}/config.json",)

    def read(self, folder):
        from tools.convert_torch_weights.sources import read_config, tensors_of

        layout, place = self.folder(), folder / self.component
        tensors, _ = tensors_of(place, layout.stem)
        config = read_config(place, layout.config)
        layout.convert(tensors, config, check_only=True)
        return repr(config)

    def different(self, folder, found):
        return None  # what it says fits the weights


class TransformerConfig(Configs):
    component = "transformer"
    own = (10**6, 2**20, [4, 6, 6], [-4, 10, 10], "FluxTransformer2DModel")

    def good(self):
        from dynaip_jax.models.flux import FluxConfig
        from tools.convert_torch_weights import flux

        config = dict(
            _class_name="FluxTransformer2DModel", patch_size=1, in_channels=64, num_layers=2, num_single_layers=2,
            attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32, pooled_projection_dim=32,
            axes_dims_rope=[4, 6, 6], guidance_embeds=True,
        )  # fmt: skip
        return config, flux.table(FluxConfig.tiny(), "diffusers"), "diffusion_pytorch_model"


class VAEConfigFile(Configs):
    component = "vae"
    own = (32, [32, 32, 64, 64], [32] * 40, 10**6, "AutoencoderKL", [32, 10**9])

    def good(self):
        from dynaip_jax.models.vae import VAEConfig
        from tools.convert_torch_weights import vae

        c = VAEConfig.tiny()
        config = dict(
            _class_name="AutoencoderKL", act_fn="silu", norm_num_groups=32, use_quant_conv=False, use_post_quant_conv=False,
            mid_block_add_attention=True, latents_mean=None, latents_std=None, down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=list(c.widths), sample_size=32, in_channels=3,
            out_channels=3, layers_per_block=1, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159,
        )  # fmt: skip
        return config, vae.table(c, "diffusers"), "diffusion_pytorch_model"


class T5ConfigFile(Configs):
    component = "text_encoder_2"
    own = (10**6, "gated-gelu", "relu", "t5")

    def good(self):
        from dynaip_jax.models.t5 import T5Config
        from tools.convert_torch_weights import t5

        config = dict(
            model_type="t5", feed_forward_proj="gated-gelu", vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=2,
            relative_attention_num_buckets=32, relative_attention_max_distance=128, layer_norm_epsilon=1e-6, is_decoder=False,
        )  # fmt: skip
        return config, t5.table(T5Config.tiny()), "model"


class CLIPTextConfigFile(Configs):
    component = "text_encoder"
    own = (10**6, "quick_gelu", "gelu", "clip_text_model", {"hidden_size": 32})

    def good(self):
        from dynaip_jax.models.clip import CLIPTextConfig
        from tools.convert_torch_weights import clip

        config = dict(
            model_type="clip_text_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=128, max_position_embeddings=77, eos_token_id=127, hidden_act="quick_gelu", layer_norm_eps=1e-5,
        )  # fmt: skip
        return config, clip.text_table(CLIPTextConfig.tiny()), "model"


class CLIPVisionConfigFile(Configs):
    component = "clip_vision"
    own = (10**6, {"hidden_size": 32}, "clip", 2**14)

    def good(self):
        from dynaip_jax.models.clip import CLIPVisionConfig
        from tools.convert_torch_weights import clip

        vision = dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=32, patch_size=8,
            num_channels=3, hidden_act="quick_gelu", layer_norm_eps=1e-5,
        )  # fmt: skip
        return dict(model_type="clip", vision_config=vision), clip.vision_table(CLIPVisionConfig.tiny()), "model"

    def folder(self):
        from dynaip_jax.models.clip import CLIPVisionConfig
        from tools.convert_torch_weights import clip
        from tools.convert_torch_weights.sources import Folder

        return Folder(self.component, CLIPVisionConfig.from_hf, clip.vision_params_from_torch, "model")


class Schedule(Reader):
    """Diffusers' scheduler and the tokenizer's settings, as the bundle's manifest takes them."""

    files = ("scheduler/scheduler_config.json", "clip/tokenizer_config.json")

    def make(self, folder):
        (folder / "scheduler").mkdir()
        (folder / "clip").mkdir()
        scheduler = dict(
            use_dynamic_shifting=True,
            base_image_seq_len=256,
            max_image_seq_len=4096,
            base_shift=0.5,
            max_shift=1.15,
            shift=3.0,
        )
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
        (folder / "clip" / "tokenizer_config.json").write_text(
            json.dumps(dict(model_max_length=77, tokenizer_class="CLIPTokenizer"))
        )

    def read(self, folder):
        from dynaip_jax.flow import ScheduleConfig
        from dynaip_jax.models.clip import CLIPTextConfig
        from tools.convert_torch_weights import flux_layout
        from tools.convert_torch_weights.sources import Source, Sources, read_json

        clip = Source(CLIPTextConfig.tiny(), {}, [], lambda *a, **k: {})
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        found = flux_layout.manifest(Sources(dict(clip_text=clip), dict(clip=folder / "clip"), scheduler), None)
        ScheduleConfig(**found["schedule"]).factor(4096)
        return repr(found)

    def different(self, folder, found):
        return None


class Npy(Reader):
    """Initial noise in a `.npy` file; what is read must be what NumPy reads."""

    files = ("noise.npy",)

    def make(self, folder):
        np.save(folder / "noise.npy", np.random.default_rng(0).normal(size=(2, 4, 3, 3)).astype(np.float32))

    def read(self, folder):
        from dynaip_jax.app.recipe import Like
        from dynaip_jax.app.sample import _load_noise

        x = _load_noise(folder / "noise.npy", None, Like())
        return str(x.dtype), x.shape, x.tobytes()

    def different(self, folder, found):
        x = np.load(folder / "noise.npy", allow_pickle=False)
        if x.size * x.itemsize > 1 << 20 or x.ndim and len(x) > 10_000:
            return f"makes {x.shape}"
        return None if found == (str(x.dtype), x.shape, np.ascontiguousarray(x).tobytes()) else "not what NumPy reads"


class Msgpack(Reader):
    """Flax's weights of CLIP; no leaf may be lost."""

    files = ("flax_model.msgpack",)

    def make(self, folder):
        from flax.serialization import msgpack_serialize

        rng = np.random.default_rng(0)
        tree = {
            "vision_model": {
                "norm": {"scale": np.ones(3, np.float32), "bias": np.zeros(3, np.float32)},
                "patch": {"kernel": rng.normal(size=(2, 2, 3, 4)).astype(np.float32)},
                "mlp": {"fc1": {"kernel": rng.normal(size=(3, 5)).astype(np.float32), "bias": np.ones(5, np.float32)}},
                "embed": {"embedding": rng.normal(size=(4, 3)).astype(np.float16)},
            },
            "logit_scale": np.float32([2.5]),
        }
        (folder / "flax_model.msgpack").write_bytes(msgpack_serialize(tree))

    def mutate(self, rng, good, folder):
        data = (good / "flax_model.msgpack").read_bytes()
        if rng.random() < 0.4:  # a name that is another's
            names = [
                b"scale",
                b"bias",
                b"kernel",
                b"fc1",
                b"norm",
                b"mlp",
                b"embed",
                b"patch",
                b"embedding",
                b"logit_scale",
            ]
            old, new = rng.choice(names), rng.choice(names)
            data = data.replace(bytes([0xA0 + len(old)]) + old, bytes([0xA0 + len(new)]) + new, rng.choice((1, -1)))
        if rng.random() < 0.7:
            data = damaged_bytes(rng, data)
        (folder / "flax_model.msgpack").write_bytes(data)

    def read(self, folder):
        from tools.convert_torch_weights.clip import from_flax

        return {
            name: (str(x.dtype), x.shape, x.tobytes()) for name, x in from_flax(folder / "flax_model.msgpack").items()
        }

    def different(self, folder, found):
        import msgpack

        arrays: list[bytes] = []

        def array(code: int, data: bytes) -> None:
            arrays.append(bytes(msgpack.unpackb(data, raw=True)[2]))

        def pairs(items: list) -> None:
            if len({name for name, _ in items}) < len(items):
                raise ValueError("a name twice")

        msgpack.unpackb(
            (folder / "flax_model.msgpack").read_bytes(), ext_hook=array, object_pairs_hook=pairs, strict_map_key=False
        )
        return None if len(arrays) == len(found) else f"{len(arrays)} arrays, {len(found)} read"


class GGUF(Reader):
    """A GGUF file: read as the package `gguf` reads it, or refused."""

    files = ("*.gguf",)

    def make(self, folder):
        import gguf

        rng, kinds = np.random.default_rng(0), gguf.GGMLQuantizationType
        writer = gguf.GGUFWriter(path=folder / "w.gguf", arch="flux")
        for name, kind in (
            ("plain", kinds.F32),
            ("half", kinds.F16),
            ("b", kinds.BF16),
            ("q8", kinds.Q8_0),
            ("q4", kinds.Q4_0),
        ):
            x = rng.normal(size=(4, 64)).astype(np.float32)
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(x, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def read(self, folder):
        from tools.convert_torch_weights.gguf_file import GGUFFile

        file = GGUFFile(folder / "w.gguf")
        arrays = {name: np.asarray(file[name]) for name in file}
        return {name: (str(x.dtype), x.shape, x.tobytes()) for name, x in arrays.items()}

    def different(self, folder, found):
        import gguf

        for t in gguf.GGUFReader(folder / "w.gguf").tensors:
            shape = tuple(int(n) for n in reversed(t.shape))
            theirs = np.zeros(shape, np.float32)
            if t.tensor_type.name in ("I8", "I16", "I32", "I64", "F64"):  # plain; the package has no word for them
                continue
            if theirs.size:  # the package cannot undo what holds nothing
                theirs = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32).reshape(shape)
            dtype, size, data = found[t.name]
            ours = np.frombuffer(data, np.dtype(dtype)).reshape(size).astype(np.float32)
            if not np.array_equal(theirs, ours, equal_nan=True):
                return f"{t.name} is read otherwise than by the package"
        return None


class Pictures(Reader):
    """Pictures of every format; any picture that comes of a mutant will do."""

    def make(self, folder):
        from PIL import Image

        x = np.random.default_rng(0).integers(0, 255, (24, 20, 3)).astype(np.uint8)
        x[:12] = 200
        picture = Image.fromarray(x)
        exif = Image.Exif()
        exif[0x0112] = 6
        kinds = dict(png={}, jpg=dict(exif=exif), webp={}, tif=dict(compression="tiff_lzw"), bmp={}, gif={}, ppm={})
        for suffix, options in kinds.items():
            picture.save(folder / f"p.{suffix}", **options)
        picture.convert("RGBA").save(folder / "alpha.png")
        picture.convert("P").save(folder / "palette.png", transparency=0)
        Image.fromarray(x[..., 0].astype(np.uint16) * 257).save(folder / "wide.png")
        picture.save(folder / "deflate.tif", compression="tiff_adobe_deflate")
        picture.save(folder / "moving.gif", save_all=True, append_images=[picture.rotate(90)])

    files = ("*.*",)

    def read(self, folder):
        from dynaip_jax import images

        return {p.name: digest(images.load_image(p)) for p in sorted(folder.iterdir())}

    def different(self, folder, found):
        return None


class Features(Reader):
    """A cache of features: batches are as before or refused."""

    files = ("cache/*.json", "cache/*/*")

    def make(self, folder):
        from dynaip_jax.data.records import write_dataset
        from tests.data.caches import write_cache

        (folder / "data").mkdir()
        write_dataset(folder / "data", records(6))
        write_cache(folder / "cache", self._config(folder), 2, dtype="bfloat16")

    def _config(self, folder: Path):
        from dynaip_jax.data.config import DataConfig

        return DataConfig(
            path=str(folder / "data"),
            features=str(folder / "cache"),
            resolution=64,
            aspects=("1:1", "3:2"),
            clip_size=32,
            workers=0,
        )

    def read(self, folder):
        from dynaip_jax.data.cached import Cached
        from dynaip_jax.data.order import make_order
        from dynaip_jax.data.records import open_dataset

        settings, dataset = self._config(folder), open_dataset(folder / "data")
        order = make_order(settings, dataset, 2)
        cached = Cached.open(settings, dataset, order, "encoders")
        batches = []
        for epoch in range(2):
            for number, bucket in enumerate(order.buckets):
                members = np.flatnonzero(order.bucket_of == number)
                batches += [cached.read(members, bucket, epoch)] if len(members) else []
        return digest([b._asdict() for b in batches])


class OldFeatures(Features):
    """A cache of before there were parts."""

    files = ("cache/*",)

    def make(self, folder):
        from tests.data.caches import as_before_parts

        super().make(folder)
        as_before_parts(folder / "cache")


def records(count: int):
    from dynaip_jax.data.check import png
    from dynaip_jax.data.records import Record

    for n in range(1, count + 1):
        x = np.random.default_rng(n).integers(0, 255, (64, 64 + 32 * (n % 2), 3)).astype(np.uint8)
        box = np.array([0, 0, *x.shape[:2]], np.int32)
        yield Record(n, png(x), box, b"", box, b"", "a cat on a mat", "cat")


class Datasets(Reader):
    """A dataset folder: its rows are as before or refused."""

    files = ("data/*",)

    def make(self, folder):
        from dynaip_jax.data.records import write_dataset

        (folder / "data").mkdir()
        write_dataset(folder / "data", records(4))

    def mutate(self, rng, good, folder):
        files = sorted((good / "data").iterdir())
        file = rng.choice(files)
        data = file.read_bytes()
        if file.suffix == ".json":
            hurt = damaged_json(rng, data, ("os.system", "tests.mutation.trap.Trap", "array_record", "train"))
        elif "array_record" in file.name and rng.random() < 0.7:  # the shard is mostly padding
            out = bytearray(data)
            end = len(data.rstrip(b"\0"))
            for _ in range(rng.choice((1, 1, 4))):
                out[rng.randrange(end)] ^= 1 << rng.randrange(8)
            hurt = bytes(out)
        else:
            hurt = damaged_bytes(rng, data)
        (folder / "data" / file.name).write_bytes(hurt)

    def read(self, folder):
        from dynaip_jax.data.records import open_dataset

        dataset = open_dataset(folder / "data")
        rows = [dataset[n]._asdict() for n in range(len(dataset))]
        return digest(dict(rows=[{k: str(v) for k, v in row.items()} for row in rows])), digest(
            [dataset.sizes, dataset.numbers]
        )


class Sources(Reader):
    """A manifest of pictures: rows, or bad rows with a reason."""

    files = ("metadata.jsonl",)

    def make(self, folder):
        lines = [dict(reference="a.png", target="a.png", caption=f"a cat on mat {n}", subject="cat") for n in range(3)]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def mutate(self, rng, good, folder):
        lines = (good / "metadata.jsonl").read_bytes().splitlines()
        n = rng.randrange(len(lines))
        lines[n] = damaged_json(rng, lines[n])
        (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))

    def read(self, folder):
        from dynaip_jax.data.sources import read_manifest

        return repr(list(read_manifest(folder).rows)).replace(str(folder), "")

    def different(self, folder, found):
        return None


class Tokenizer(Reader):
    """A tokenizer without checksums, as the converter takes it."""

    files = ("*.json",)
    own = ("CLIPTokenizer", "T5TokenizerFast", {"AutoTokenizer": ["code.Trap", None]}, "BPE", "Unigram", "WordPiece")

    def make(self, folder):
        from dynaip_jax.testing import _tokenizers

        (folder / "made").mkdir()
        for file in _tokenizers(folder / "made")["t5"].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())

    def read(self, folder):
        from dynaip_jax.families.tokenizers import check_tokenizer

        return repr(check_tokenizer(folder)(["a star on grass"])["input_ids"])

    def different(self, folder, found):
        return None


class Loras(Reader):
    """A LoRA file: names, shapes, dtypes, numbers and settings in the header; merged into weights. One with another tensor may be read if
    what is left is a LoRA; the same tensors under other names are the same."""

    def make(self, folder):
        from safetensors.numpy import save_file

        from tests.adapters.lora_files import FILES, bfl_weights

        base = bfl_weights(self.names())
        tensors, metadata = {}, FILES["diffusers, header"](base).metadata
        for kind, start in (
            ("diffusers", "transformer.single_transformer_blocks.0.attn.to_q."),
            ("kohya", "lora_unet_img_in."),
            ("differences", "diffusion_model.double_blocks.0."),
            ("LoKr", "lycoris_double_blocks_1_txt_attn_qkv."),
            ("DoRA of inputs", "diffusion_model.single_blocks.1.linear2."),
        ):
            whole = FILES[kind](base).tensors
            tensors |= {name: np.asarray(x) for name, x in whole.items() if name.startswith(start)}
        save_file(tensors, folder / "a.safetensors", metadata=metadata)

    @staticmethod
    @lru_cache(maxsize=1)
    def public():
        from dynaip_jax.families.flux_names import public_names
        from dynaip_jax.models.clip import CLIPTextConfig
        from dynaip_jax.models.t5 import T5Config
        from tests.adapters.lora_files import CONFIG

        return public_names(CONFIG, CLIPTextConfig.tiny(), T5Config.tiny())

    def names(self):
        return self.public().components["transformer"]

    def mutate(self, rng, good, folder):
        import ml_dtypes
        from safetensors import safe_open
        from safetensors.numpy import load_file, save_file

        path = folder / "a.safetensors"
        if rng.random() < 0.1:
            path.write_bytes(damaged_bytes(rng, path.read_bytes()))
            return
        tensors = load_file(path)
        with safe_open(path, "numpy") as file:
            metadata = file.metadata()
        name = rng.choice(sorted(tensors))
        x, kind = tensors[name], rng.randrange(8)
        if kind == 0:
            metadata = {
                key: damaged_json(rng, value.encode()).decode("utf-8", "replace") for key, value in metadata.items()
            }
        elif kind == 1:
            del tensors[name]
        elif kind == 2:
            at = rng.randrange(len(name))
            tensors[name[:at] + rng.choice(("", ".", "_", "9", "\n", "lora_A")) + name[at + rng.randrange(4) :]] = (
                tensors.pop(name)
            )
        elif kind == 3:
            ends = (
                ".lora_A.weight",
                ".alpha",
                ".diff",
                ".dora_scale",
                ".lokr_w1",
                ".hada_w1_a",
                ".set_weight",
                ".weight",
                ".diff_b",
            )
            tensors[name.rsplit(".", rng.randrange(1, 3))[0] + rng.choice(ends)] = x
        elif kind == 4:
            shapes = ((), (0,), (1,), x.shape[::-1], (*x.shape, 1, 1), (*x.shape, 2), x.shape[:1], (0, 3), (3, 0))
            tensors[name] = np.zeros(rng.choice(shapes), x.dtype)
        elif kind == 5:
            kinds = (np.int32, np.bool_, np.uint8, np.float64, np.float16, ml_dtypes.bfloat16)
            tensors[name] = x.astype(rng.choice(kinds))
        elif kind == 6:
            tensors[name] = np.full(x.shape, rng.choice((np.nan, np.inf, 3e38, 0, -1, 1e-45)), np.float32).astype(
                x.dtype
            )
        else:
            prefix = rng.choice(("transformer.", "diffusion_model.", "base_model.model.", "lora_te1_", ""))
            tensors[prefix + name.removeprefix("transformer.")] = x
        save_file(
            {key: np.ascontiguousarray(value).reshape(value.shape) for key, value in tensors.items()}, path, metadata
        )

    def read(self, folder):
        from dynaip_jax.adapters.lora import Scaled, merge
        from dynaip_jax.sampling.loras import _read

        lora = _read(str(folder / "a.safetensors"), 1.0, self.public())
        leaves: dict[str, Any] = {}
        for tensor in self.names().tensors.values():
            for piece in tensor.pieces:
                rows, columns = (span[1] - span[0] if span else 1 for span in (piece.rows, piece.columns))
                shape = (rows,) if piece.columns is None else (columns, rows)
                leaves[piece.leaf] = np.zeros(shape if piece.block is None else (2, *shape), np.float32)
        changes = [Scaled(change, 1.0) for change in lora.changes if change.component == "transformer"]
        return digest(merge(unflatten(leaves), self.names(), changes))

    def different(self, folder, found):
        from safetensors import SafetensorError, deserialize

        try:
            deserialize((folder / "a.safetensors").read_bytes())
        except SafetensorError as e:
            return f"the library refuses it: {e}"
        return None


class PublicAdapters(Loras):
    """An image-prompt adapter in InstantX's file: the same mutants; read as a pipeline that is loaded with it does."""

    def make(self, folder):
        from safetensors.numpy import save_file

        from dynaip_jax.adapters.instantx import InstantXConfig

        shapes = InstantXConfig(3, 8, 36, 12, 2, 2, 4, 16).shapes()
        rng = np.random.default_rng(0)
        tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        save_file(tensors, folder / "a.safetensors", metadata=dict(note='{"made": [1, "x"]}'))

    @staticmethod
    @lru_cache(maxsize=1)
    def family():
        from dynaip_jax.models.siglip import SiglipVisionConfig
        from dynaip_jax.testing import tiny_family

        return tiny_family(siglip=SiglipVisionConfig.tiny())

    def read(self, folder):
        import flax.linen as nn

        from dynaip_jax.adapters.ip_adapter import abstract_ip_adapter_params
        from dynaip_jax.runtime.sharding import on_one_device
        from dynaip_jax.sampling.public_adapters import PublicFile
        from dynaip_jax.storage.bundle import Bundle

        file = PublicFile.open(folder / "a.safetensors")
        config = file.config(Bundle(folder, dict(components={})), self.family())
        return digest(file.read(config, on_one_device(nn.meta.unbox(abstract_ip_adapter_params(config)))))


class JobsFile(lists.JobsList, Reader):
    """See `lists`."""


class OwnSetFile(lists.OwnSet, Reader):
    """See `lists`."""


class AnswersFile(lists.Answers, Reader):
    """See `lists`."""


class ScoresOfRun(lists.ScoresFile, Reader):
    """See `lists`."""


def unflatten(leaves):
    from flax.traverse_util import unflatten_dict

    return unflatten_dict(leaves, sep="/")


READERS: dict[str, Callable[[], Reader]] = dict(
    safetensors=Safetensors, index=Index, adapter_json=AdapterFile, adapter_weights=AdapterWeights, bundle_json=BundleFile,
    bundle_folder=BundleFolder, old_bundle_folder=OldBundleFolder, transformer_config=TransformerConfig, vae_config=VAEConfigFile,
    t5_config=T5ConfigFile, clip_text_config=CLIPTextConfigFile, clip_vision_config=CLIPVisionConfigFile, schedule=Schedule,
    npy=Npy, msgpack=Msgpack, gguf=GGUF, pictures=Pictures, features=Features, old_features=OldFeatures, datasets=Datasets, sources=Sources, tokenizer=Tokenizer,
    loras=Loras, public_adapters=PublicAdapters, jobs=JobsFile, own_set=OwnSetFile, answers=AnswersFile, scores=ScoresOfRun,
)  # fmt: skip
