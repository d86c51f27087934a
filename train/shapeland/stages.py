"""Trains a model of Shapeland from nothing: autoencoder, encoders, judge, base model and adapter.

python -m train.shapeland --workdir runs/shapeland

Stages run in order; a finished one is not run again, and one that was cut off goes on from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dynaip_jax import images
from dynaip_jax.commandline import Parser
from dynaip_jax.data.config import DataConfig
from dynaip_jax.data.records import write_dataset
from dynaip_jax.errors import UserError
from dynaip_jax.families.flux import Flux1
from dynaip_jax.families.registry import open_bundle
from dynaip_jax.families.tokenizers import Tokenizers
from dynaip_jax.flow import ScheduleConfig
from dynaip_jax.layers.compute import Compute
from dynaip_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from dynaip_jax.models.flux import FluxConfig
from dynaip_jax.models.t5 import T5Config
from dynaip_jax.models.vae import VAEConfig
from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.shapeland import dataset, default
from dynaip_jax.shapeland import measure as shapeland
from dynaip_jax.shapeland import world as synthetic
from dynaip_jax.shapeland.cases import truth
from dynaip_jax.shapeland.judge import Judge, init_judge
from dynaip_jax.storage.bundle import NewComponent, replace_component, write_bundle
from dynaip_jax.storage.codec import to_dict
from dynaip_jax.storage.folders import replacing
from dynaip_jax.storage.manifest import flatten
from dynaip_jax.storage.tensors import read_tree
from train.cache import cache
from train.checkpoint import Checkpoints
from train.config import AdapterChoices, OptimConfig, TrainConfig
from train.export import export
from train.loop import train
from train.step import TrainState, init_state, updated

SPECIAL = ("<pad>", "</s>", "<s>", "<unk>", "<mask>")
TOKENS = dict(t5_length=24, clip_length=32)
WORDS = [*SPECIAL, *synthetic.vocabulary()]
END = SPECIAL.index("</s>")
LEVELS = (2, 4, 6)

CONFIGS: dict[str, Any] = dict(
    vae=VAEConfig(resolution=64, ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=8),
    t5=T5Config(vocab_size=len(WORDS), d_model=128, d_kv=16, d_ff=256, num_heads=8, num_layers=2),
    clip_text=CLIPTextConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=len(WORDS), max_position_embeddings=TOKENS["clip_length"], eos_token_id=END,
    ),
    clip_vision=CLIPVisionConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4, image_size=64, patch_size=8,
    ),
    transformer=FluxConfig(
        in_channels=32, out_channels=32, vec_in_dim=128, context_in_dim=128, hidden_size=128, num_heads=4, depth=4,
        depth_single_blocks=2, axes_dim=(8, 12, 12), guidance_embed=False,
    ),
)  # fmt: skip

FAMILY = Flux1(
    tuple(CONFIGS.items()), tuple((name, Compute()) for name in CONFIGS), ScheduleConfig(), tuple(TOKENS.items())
)

DATA = DataConfig(resolution=64, aspects=("1:1",), clip_size=64, crop_reference=0.85, workers=0)
BASE = TrainConfig(
    data=DATA,
    adapter=AdapterChoices(levels=LEVELS, expert_width=256),
    optim=OptimConfig(kind="muon", rate=1.5e-3, warmup=100, decay_steps=4200, final=0.02, ema=0.997),
    trainable="base",
    fresh_base=True,
    steps=4200,
    batch=64,
    time_mean=0.8,  # towards noise, where it is decided what is drawn
    time_std=1.2,
    dtype="float32",
    remat="none",
    log_every=25,
    save_every=250,
    keep=1,
)
ADAPTER = dataclasses.replace(
    BASE,
    optim=dataclasses.replace(BASE.optim, decay_steps=1400),
    adapter=dataclasses.replace(BASE.adapter, blocks="all"),
    random_granularity=0.3,
    time_mean=0.4,
    trainable="adapter",
    fresh_base=False,
    steps=1400,
)
FURTHER = 3600  # steps of a base that is not fresh
SCENES, PAIRS = 24_000, 16_000  # rows of the two datasets
SHIPPED = "bfloat16"
TRUE_CFG = 2.5
DONE, SPENT, WEIGHTS, MADE = "done.json", "seconds.txt", "weights.safetensors", "made.json"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m train.shapeland",
        description="Trains all models of Shapeland from nothing, stage by stage; run again to go on.",
    )
    parser.add_argument("--workdir", type=Path, required=True, metavar="DIR", help="everything goes there")
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=[*STAGES, *EXTRA],
        metavar="STAGE",
        help=f"only these: {', '.join(STAGES)}; or {', '.join(EXTRA)}, which is not among the usual ones",
    )
    parser.add_argument(
        "--go-on",
        action="store_true",
        help="start from the models in the package: train base and judge further, T5 and adapter anew, keep the rest",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of worlds, weights and order (default 0)")
    args = parser.parse_args(argv)
    stages = (KEPT if args.go_on else STAGES) | EXTRA
    for name in args.stages or [name for name in stages if name not in EXTRA]:
        if name not in stages:
            raise UserError(
                f"--stages {name}: is kept with --go-on; expected some of {', '.join(stages)}; leave it out"
            )
        folder = args.workdir / name
        if (folder / DONE).is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        began, spent = time.monotonic(), folder / SPENT
        before = float(spent.read_text()) if spent.is_file() else 0.0
        print(f"stage {name}", file=sys.stderr)
        try:
            stages[name](folder, args.seed)
        finally:
            seconds = before + time.monotonic() - began
            spent.write_text(f"{seconds:.0f}\n")
        note = dict(stage=name, seed=args.seed, seconds=round(seconds), device=jax.devices()[0].device_kind)
        (folder / DONE).write_text(json.dumps(note) + "\n")
    return 0


# --- a small training loop for what is neither base nor adapter


class _Position:
    """Data whose batches are a function of the step: nothing of it needs to be kept."""

    def get_state(self) -> dict[str, int]:
        return {}

    def set_state(self, state: dict[str, int]) -> None:
        pass


def fit(
    folder: Path,
    params: Any,
    loss: Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    batch_of: Callable[[int], Any],
    steps: int,
    rate: float,
    seed: int,
    ema: float = 0.995,
) -> Any:
    """Trains `params` for `steps` steps of `loss(params, batch, key) -> (loss, figures)`; returns their average.

    Checkpoints lie in `folder`; what is there already is gone on with.
    """
    optim = OptimConfig(rate=rate, warmup=min(100, steps // 10), decay_steps=steps, final=0.02, ema=ema)
    checkpoints = Checkpoints(folder, keep=1)

    @partial(jax.jit, donate_argnums=0)
    def step_fn(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (value, figures), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key)
        return updated(optim, state, grads), dict(loss=value) | figures

    try:
        state = init_state(optim, params)
        start = checkpoints.latest() or 0
        if start:
            here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)
            state = checkpoints.restore(start, target, _Position())
        for step in range(start, steps):
            state, figures = step_fn(state, batch_of(step))
            done = step + 1
            if done % 50 == 0 or done == steps:
                print(f"step {done}  " + "  ".join(f"{k} {float(v):.4f}" for k, v in figures.items()), file=sys.stderr)
            if done % 250 == 0 or done == steps:
                checkpoints.save(done, state, _Position(), float(figures["loss"]))
        return jax.tree.map(np.asarray, state.ema)
    finally:
        checkpoints.close()


def _order(seed: int, step: int, count: int, batch: int) -> np.ndarray:
    """Indices of the batch of `step` among `count` items."""
    return np.random.default_rng((seed, step)).choice(count, batch, replace=False)


def _in_processes(make: Callable[[int], Any], count: int) -> list[Any]:
    """`make(n)` for n below `count`, by all cores."""
    with multiprocessing.get_context("spawn").Pool() as pool:
        return pool.map(make, range(count), chunksize=64)


def _save(path: Path, params: Any) -> None:
    from safetensors.numpy import save_file

    save_file({k: np.ascontiguousarray(v) for k, v in flatten(params).items()}, path)


def _unit(pictures: ArrayLike) -> jax.Array:
    """uint8 -> float32 in [-1, 1]."""
    return jnp.asarray(pictures, jnp.float32) / 127.5 - 1


# --- stages


def _image(seed: int, n: int) -> np.ndarray:
    return synthetic.render(dataset.sample_mixed(synthetic.generator(seed, "train", n))).image


def train_vae(folder: Path, seed: int) -> None:
    """L1, L2 and a weak KL, first on quarters of pictures (cheap), then on whole ones; latents are then scaled to unit size.

    Latents of half the size must decode to the picture of half the size (EQ-VAE, arXiv 2502.09509): they are then laid out like
    pictures, which a base model learns sooner.
    """
    pictures = np.stack(_in_processes(partial(_image, seed), 8000))
    module = FAMILY.module("vae")

    def halved(x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))

    def loss(params, batch, key):
        x = _unit(batch)
        moments = module.apply({"params": params}, x, method="encode")
        mean, logvar = jnp.split(moments, 2, axis=-1)
        noise = jnp.moveaxis(jax.random.normal(key, mean.shape), -1, 1)
        latents = jnp.moveaxis(module.apply({}, moments, noise, method="latents"), 1, -1)

        def error(latents, target):
            return module.apply({"params": params}, jnp.moveaxis(latents, -1, 1), method="decode") - target

        whole, half = error(latents, x), error(halved(latents), halved(x))
        kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean()
        cost = [jnp.abs(e).mean() + jnp.square(e).mean() for e in (whole, half)]
        psnr, psnr_half = (-10 * jnp.log10(jnp.mean(e**2) / 4) for e in (whole, half))
        return cost[0] + 0.5 * cost[1] + KL * kl, dict(psnr=psnr, psnr_half=psnr_half, kl=kl)

    def batch_of(step: int, whole: bool):
        rng = np.random.default_rng((seed, step, whole))
        some = pictures[rng.choice(len(pictures), 8 if whole else 16, replace=False)]
        if whole:
            return some
        top, left = rng.integers(0, 33, (2, len(some)))
        return np.stack([x[t : t + 32, s : s + 32] for x, t, s in zip(some, top, left, strict=True)])

    params = FAMILY.init_params("vae", jax.random.key(seed))
    params = fit(folder / "quarters", params, loss, partial(batch_of, whole=False), VAE_STEPS[0], 2e-3, seed)
    params = fit(folder / "whole", params, loss, partial(batch_of, whole=True), VAE_STEPS[1], 6e-4, seed)
    moments = jax.jit(lambda x: module.apply({"params": params}, _unit(x), method="encode"))(pictures[:512])
    mean, logvar = np.split(np.asarray(moments), 2, axis=-1)
    scale = dict(shift_factor=float(mean.mean()), scale_factor=float(1 / np.sqrt(mean.var() + np.exp(logvar).mean())))
    (folder / "scale.json").write_text(json.dumps(scale))
    _save(folder / WEIGHTS, params)


VAE_STEPS = (2200, 400)
KL = 0.006  # at this weight the noise of latents costs about 0.006 in [-1, 1] of each pixel, which is not seen


def _caption(seed: int, n: int) -> str:
    return synthetic.caption(dataset.sample_mixed(synthetic.generator(seed, "train", n)))


def train_text(folder: Path, seed: int) -> None:
    """T5's encoder by naming words: each state must tell its own word, a share of which is hidden, and the words `NEAR` to it.

    Masked words alone leave the states of words of a kind nearly alike, and do not ask which subject stands where.
    """
    tokenizers = _load_tokenizers()
    captions = _in_processes(partial(_caption, seed), 20_000)
    ids = tokenizers.t5(captions)
    module = FAMILY.module("t5")

    def loss(params, batch, key):
        words = batch >= len(SPECIAL)
        hidden = words & (jax.random.uniform(key, batch.shape) < HIDDEN)
        states = module.apply({"params": params["t5"]}, jnp.where(hidden, SPECIAL.index("<mask>"), batch))
        cost, right, asked = 0.0, 0, 0
        for offset in NEAR:
            target = jnp.roll(batch, -offset, axis=1)
            there = words & jnp.roll(words, -offset, axis=1)
            logits = states @ params["heads"][str(offset)]
            nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], -1)[..., 0]
            cost += (nll * there).sum() / there.sum()
            right, asked = right + ((logits.argmax(-1) == target) & there).sum(), asked + there.sum()
        return cost / len(NEAR), dict(accuracy=right / asked)

    keys = jax.random.split(jax.random.key(seed + 1), len(NEAR))
    heads = {
        str(offset): jax.random.normal(key, (CONFIGS["t5"].d_model, len(WORDS))) * 0.05
        for offset, key in zip(NEAR, keys, strict=True)
    }
    params = dict(t5=FAMILY.init_params("t5", jax.random.key(seed)), heads=heads)
    params = fit(
        folder / "run", params, loss, lambda step: ids[_order(seed, step, len(ids), 128)], T5_STEPS, 4e-3, seed
    )
    _save(folder / WEIGHTS, params["t5"])


T5_STEPS, HIDDEN, NEAR = 1000, 0.15, range(-4, 5)


def _described(seed: int, n: int) -> tuple[np.ndarray, str]:
    rng = synthetic.generator(seed, "train", n)
    scene = synthetic.sample_scene(rng, 1, large=True) if n % 3 else synthetic.sample_scene(rng, 1 + (n // 3) % 2)
    text = synthetic.description(scene) if len(scene.subjects) == 1 else synthetic.caption(scene)
    return synthetic.render(scene).image, text


def train_clip(folder: Path, seed: int) -> None:
    """Both towers, by telling which description belongs to which picture."""
    tokenizers = _load_tokenizers()
    pictures, texts = zip(*_in_processes(partial(_described, seed), 16_000), strict=True)
    pixels, ids = np.stack(pictures), tokenizers.clip(texts)
    vision, text = (FAMILY.module(name) for name in ("clip_vision", "clip_text"))
    last = (CONFIGS["clip_vision"].num_hidden_layers,)

    def loss(params, batch, key):
        shown, said = batch
        x = (jnp.asarray(shown, jnp.float32) / 255 - images.CLIP_MEAN) / images.CLIP_STD
        _, pooled = vision.apply({"params": params["clip_vision"]}, x, layers=last)
        _, words = text.apply({"params": params["clip_text"]}, said)
        a, b = pooled @ params["see"], words @ params["read"]
        a, b = (v / jnp.linalg.norm(v, axis=-1, keepdims=True) for v in (a, b))
        logits = a @ b.T * jnp.exp(params["scale"])
        nll = -0.5 * (jnp.diag(jax.nn.log_softmax(logits, 0)) + jnp.diag(jax.nn.log_softmax(logits, 1))).mean()
        return nll, dict(accuracy=(logits.argmax(-1) == jnp.arange(len(a))).mean())

    keys = jax.random.split(jax.random.key(seed), 4)
    params: dict[str, Any] = {
        name: FAMILY.init_params(name, k) for name, k in zip(("clip_vision", "clip_text"), keys, strict=False)
    }
    params |= {
        name: jax.random.normal(k, (128, 96)) * 128**-0.5 for name, k in zip(("see", "read"), keys[2:], strict=True)
    }
    params["scale"] = jnp.array(2.3)

    def batch_of(step: int):
        rows = _order(seed, step, len(pixels), 128)
        return pixels[rows], ids[rows]

    params = fit(folder / "run", params, loss, batch_of, CLIP_STEPS, 1e-3, seed)
    _save(folder / WEIGHTS, {name: params[name] for name in ("clip_vision", "clip_text")})


CLIP_STEPS = 550


def _judged(seed: int, n: int) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """Two pictures of one subject, in scenes of their own, with what there is to know of them."""
    rng = synthetic.generator(seed, "judge", n)
    kind, identity = str(rng.choice(synthetic.CLASSES)), synthetic.sample_identity(rng)
    found = []
    for _ in range(2):
        count = int(rng.choice(4, p=(0.3, 0.25, 0.25, 0.2)))  # 0: a close view
        others = [str(k) for k in rng.permutation([k for k in synthetic.CLASSES if k != kind])[: max(count - 1, 0)]]
        subjects = [(kind, identity), *((k, synthetic.sample_identity(rng)) for k in others)]
        scene = synthetic.sample_scene(rng, subjects=subjects, large=not count)
        found.append(
            (synthetic.render(scene).image, _labels(scene) | dict(subject=np.int32(synthetic.CLASSES.index(kind))))
        )
    empty = synthetic.sample_scene(rng, 0)
    return [*found, (synthetic.render(empty).image, _labels(empty) | dict(subject=np.int32(-1)))]


def _labels(scene: synthetic.Scene) -> dict[str, Any]:
    return {name: x[0].astype(np.int32) for name, x in truth([scene])._asdict().items()}


def train_judge(folder: Path, seed: int, fresh: bool = True) -> None:
    """Attributes by cross-entropy, identity by telling the same subject from others of its class."""
    pool = _in_processes(partial(_judged, seed), JUDGE_POOL)
    pictures = np.stack([[image for image, _ in three] for three in pool])
    labels = jax.tree.map(
        lambda *x: np.stack(x).reshape(len(pool), 3, *x[0].shape), *[t for three in pool for _, t in three]
    )

    def loss(params, batch, key):
        shown, label = batch
        blur_key, noise_key = jax.random.split(key)
        x = _unit(shown)
        soft = (x + sum(jnp.roll(x, shift, axis) for axis in (1, 2) for shift in (-1, 1))) / 5
        x = x + jax.random.uniform(blur_key, (len(x), 1, 1, 1)) * (soft - x)
        v: Any = Judge().apply({"params": params}, x + 0.03 * jax.random.normal(noise_key, x.shape))
        there = label["position"] >= 0
        present = jnp.logaddexp(0, jnp.where(there, -v.present, v.present)).mean()
        place = -jnp.take_along_axis(jax.nn.log_softmax(v.position), jnp.maximum(label["position"], 0)[..., None], -1)[
            ..., 0
        ]
        place = (place * there).sum() / there.sum()
        ground, number = (
            -jnp.take_along_axis(jax.nn.log_softmax(logits), label[name][:, None], -1).mean()
            for name, logits in (("background", v.background), ("number", v.number))
        )
        n = len(x) * 2 // 5  # the batch is n first views, n second views, n / 2 empty scenes
        kinds = label["subject"][:n]
        first, second = (v.identity[jnp.arange(n) + start, kinds] for start in (0, n))
        logits = jnp.where(kinds[:, None] == kinds[None], first @ second.T * IDENTITY_SCALE, -1e9)
        same = -0.5 * (jnp.diag(jax.nn.log_softmax(logits, 0)) + jnp.diag(jax.nn.log_softmax(logits, 1))).mean()
        figures = dict(
            present=((v.present > 0) == there).all(-1).mean(),
            place=((v.position.argmax(-1) == label["position"]) & there).sum() / there.sum(),
            ground=(v.background.argmax(-1) == label["background"]).mean(),
            number=(v.number.argmax(-1) == label["number"]).mean(),
            same=(logits.argmax(-1) == jnp.arange(n)).mean(),
        )
        return 8 * present + place + ground + number + same, figures

    def batch_of(step: int):
        rows = _order(seed, step, len(pictures), 64)
        parts = [(rows, 0), (rows, 1), (rows[:32], 2)]
        pick = lambda x: np.concatenate([x[r, view] for r, view in parts])  # noqa: E731
        return pick(pictures), jax.tree.map(pick, labels)

    params = init_judge(jax.random.key(seed)) if fresh else read_tree(default.JUDGE)
    params = fit(folder / "run", params, loss, batch_of, JUDGE_STEPS if fresh else JUDGE_FURTHER, 2e-3, seed)
    _save(folder / WEIGHTS, params)


JUDGE_FURTHER = 500  # steps of a judge that is not fresh
JUDGE_POOL, JUDGE_STEPS, IDENTITY_SCALE = 8000, 1600, 10.0


def write_world(folder: Path, seed: int) -> None:
    """The two datasets of the trainer: scenes for the base, pairs of one subject for the adapter."""
    for name, make, count in (("scenes", dataset.scene_record, SCENES), ("pairs", dataset.pair_record, PAIRS)):
        with replacing(folder / name, overwrite=True, marks=("index.npz",)) as work:
            write_dataset(work, _in_processes(partial(make, seed), count))


def write_encoders(folder: Path, seed: int) -> None:
    """A bundle of what is trained so far, with a transformer of random weights."""
    root = folder.parent
    scale = json.loads((root / "vae" / "scale.json").read_text())
    trained = dict(
        vae=read_tree(root / "vae" / WEIGHTS),
        t5=read_tree(root / "text" / WEIGHTS),
        **read_tree(root / "clip" / WEIGHTS),
    )

    def components() -> Iterator[NewComponent]:
        for name, config in CONFIGS.items():
            config = dataclasses.replace(config, **scale) if name == "vae" else config
            params = trained.get(name) or FAMILY.init_params(name, jax.random.key(seed))
            params = jax.tree.map(lambda x: np.asarray(x, jnp.dtype(SHIPPED)), params)
            yield NewComponent(name, to_dict(config), params, [dict(made_by=f"train.shapeland, seed {seed}")])

    with tempfile.TemporaryDirectory() as work:
        write_bundle(
            folder / "bundle",
            components(),
            family="flux",
            schedule=to_dict(ScheduleConfig()),
            text=TOKENS,
            defaults=dict(steps=16, true_cfg=TRUE_CFG, height=synthetic.SIZE, width=synthetic.SIZE),
            tokenizers=write_tokenizers(Path(work)),
            overwrite=True,
        )


def keep_encoders(folder: Path, seed: int) -> None:
    """The package's bundle with the T5 trained here."""
    params = jax.tree.map(lambda x: np.asarray(x, jnp.dtype(SHIPPED)), read_tree(folder.parent / "text" / WEIGHTS))
    origin = dict(made_by=f"train.shapeland --go-on, seed {seed}")
    replace_component(
        open_bundle(default.paths()[0]), folder / "bundle", "t5", params, origin,
        config=to_dict(CONFIGS["t5"]), overwrite=True,
    )  # fmt: skip


def train_base(folder: Path, seed: int, fresh: bool = True) -> None:
    """The transformer, text to image; then a bundle with it."""
    config = dataclasses.replace(BASE, fresh_base=fresh)
    if not fresh:
        config = dataclasses.replace(config, steps=FURTHER, optim=dataclasses.replace(BASE.optim, decay_steps=FURTHER))
    run = _trained(config, folder, seed, folder.parent / "encoders" / "bundle", folder.parent / "world" / "scenes")
    export(run, None, folder / "bundle", dtype=SHIPPED, overwrite=True)


def train_adapter(folder: Path, seed: int) -> None:
    """The adapter on scenes of one subject, the base frozen."""
    run = _trained(ADAPTER, folder, seed, folder.parent / "base" / "bundle", folder.parent / "world" / "pairs")
    export(run, folder / "adapter", None, dtype=SHIPPED, overwrite=True)


def _trained(
    config: TrainConfig, folder: Path, seed: int, bundle: Path, records: Path, features: Path | None = None
) -> Path:
    """Caches the features of `dataset` (in `folder`, unless `features` says where), trains on them, and returns the run's folder."""
    config = dataclasses.replace(
        config, bundle=str(bundle), seed=seed, data=dataclasses.replace(config.data, path=str(records), seed=seed)
    )
    features = features or folder / "features"
    if not features.exists():
        cache(config, features)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, features=str(features)))
    state = train(config, folder / "run", resume=True)
    if int(state.step) < config.steps:  # it was asked to stop: the stage is not done
        raise KeyboardInterrupt
    return folder / "run"


def ship(folder: Path, seed: int) -> None:
    """Copies what was trained into the package, with a note of how it was made."""
    root = folder.parent
    stages = [json.loads((root / name / DONE).read_text()) for name in STAGES if (root / name / DONE).is_file()]
    made: dict[str, Any] = dict(command=f"python -m train.shapeland --workdir DIR --seed {seed}", stages=stages)
    if not (root / "vae").exists():  # it went on from what the package had
        made["command"] += " --go-on"
        made["before"] = json.loads((default.ASSETS / MADE).read_text())
    made["versions"] = {name: version(name) for name in ("dynaip_jax", "jax", "flax", "optax", "numpy")}
    with replacing(default.ASSETS, overwrite=True, marks=(MADE,)) as work:
        shutil.copytree(root / "base" / "bundle", work / "bundle")
        shutil.copytree(root / "adapter" / "adapter", work / "adapter")
        shutil.copy(root / "judge" / WEIGHTS, work / default.JUDGE.name)
        if default.RETRAINED.is_file():
            shutil.copy(default.RETRAINED, work)
        (work / MADE).write_text(json.dumps(made, indent=2) + "\n")


def train_variants(folder: Path, seed: int) -> None:
    """Adapters that differ in one choice, each trained for `VARIANT_STEPS` steps, then measured; rows go into the package."""
    root, rows = folder.parent, []
    bundle = root / "base" / "bundle"
    for name, (_, changes) in VARIANTS.items():
        if (folder / name / "adapter").exists():
            continue
        print(f"variant {name}", file=sys.stderr)
        config = dataclasses.replace(
            ADAPTER,
            steps=VARIANT_STEPS,
            optim=dataclasses.replace(ADAPTER.optim, decay_steps=VARIANT_STEPS),
            adapter=dataclasses.replace(ADAPTER.adapter, **changes),
        )
        same = name == SAME_PICTURE
        records = root / "world" / ("same" if same else "pairs")
        if same and not records.exists():
            with replacing(records, overwrite=True, marks=("index.npz",)) as work:
                write_dataset(work, _in_processes(partial(dataset.pair_record, seed, reference="same"), PAIRS // 2))
        features = (folder if same else root / "adapter") / "features"
        run = _trained(config, folder / name, seed, bundle, records, features)
        export(run, folder / name / "adapter", None, dtype=SHIPPED, overwrite=True)

    judge = read_tree(root / "judge" / WEIGHTS)
    for name, (asks, _) in VARIANTS.items():
        pipe = DynaIPPipeline.load(bundle, folder / name / "adapter")
        for row in shapeland.evaluate(pipe, judge, ["default", "dds-off"], seed=seed):
            facts = dict(asks=asks, seed=seed, steps=VARIANT_STEPS)
            dds = "" if row["name"] == "default" else f", {row['name']}"
            rows.append(row | dict(name=f"retrained: {name}{dds}") | facts)
    default.RETRAINED.write_text(json.dumps(dict(rows=rows), indent=1) + "\n")


SAME_PICTURE = "same picture"
VARIANT_STEPS = 800
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> what it asks, fields of AdapterChoices
    "default": ("the defaults, trained as briefly as the variants", {}),
    "double blocks": ("no injection into the single blocks", dict(blocks="double")),
    "query after RoPE": ("the query of the reference term with its position", dict(query="after_rope")),
    "last layer": ("no HMoE: CLIP's last layer alone", dict(weights=(0.0, 0.0, 1.0))),
    "equal weights": ("no router: all levels alike", dict(weights=(1.0, 1.0, 1.0))),
    SAME_PICTURE: ("the reference is the target itself", {}),
}
STAGES: dict[str, Callable[[Path, int], None]] = dict(
    world=write_world, vae=train_vae, clip=train_clip, text=train_text, encoders=write_encoders, base=train_base,
    judge=train_judge, adapter=train_adapter, ship=ship,
)  # fmt: skip
KEPT: dict[str, Callable[[Path, int], None]] = dict(
    world=write_world, text=train_text, encoders=keep_encoders, base=partial(train_base, fresh=False),
    judge=partial(train_judge, fresh=False), adapter=train_adapter, ship=ship,
)  # fmt: skip
EXTRA = dict(variants=train_variants)  # runs only when named


def write_tokenizers(folder: Path) -> dict[str, Path]:
    """Whole-word tokenizers of the world's vocabulary, in the form that transformers reads: `folder`/t5, `folder`/clip."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocab = {word: n for n, word in enumerate(WORDS)}
    found = {}
    for name, template in (("t5", "$A </s>"), ("clip", "<s> $A </s>")):
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="removed")]
        )
        tokenizer.add_special_tokens(list(SPECIAL))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(t, vocab[t]) for t in ("<s>", "</s>")]
        )
        found[name] = folder / name
        found[name].mkdir(parents=True)
        tokenizer.save(str(found[name] / "tokenizer.json"))
        config = dict(tokenizer_class="PreTrainedTokenizerFast", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
        (found[name] / "tokenizer_config.json").write_text(json.dumps(config))
    return found


def _load_tokenizers() -> Tokenizers:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizers(Path(folder))
        return Tokenizers.load(Path(folder), **TOKENS)
