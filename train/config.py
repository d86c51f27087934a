"""What a training run is: frozen dataclasses, one recipe a file in `configs/`, every field settable on the command line."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from dynaip_jax.commandline import run_tyro
from dynaip_jax.data.config import PATH, SEEDS, DataConfig, in_range
from dynaip_jax.errors import UserError
from dynaip_jax.reading import is_file
from dynaip_jax.runtime.sharding import MeshConfig

# Metadata of fields that may differ between a run and its resumption: they change neither a value that is trained nor its
# order. Of a nested config either all fields, or those named. Where a dataset, its features or a bundle lie may differ too.
RESUMABLE = dict(resumable=True)


def _resumable(default: Any) -> Any:
    kind = "default_factory" if isinstance(default, type) else "default"
    return field(**{kind: default}, metadata=RESUMABLE)


@dataclass(frozen=True)
class AdapterChoices:
    """The adapter to train; sizes not here are the base's and its CLIP's."""

    blocks: Literal["double", "all"] = "all"  # which blocks of the base it is injected into
    query: Literal["before_rope", "after_rope"] = "before_rope"  # of the reference term, in the base's blocks
    merge: Literal["sum", "concat"] = "sum"  # of several references: one softmax each, or one over all
    levels: tuple[int, int, int] = (10, 17, 24)  # CLIP hidden states, low to high
    router: Literal["image", "token"] = "image"
    weights: tuple[float, float, float] | None = None  # of the levels, fixed, in place of a router
    expert_width: int = 4096
    resampler_tokens: int = 0  # 0 keeps all of CLIP's tokens

    def __post_init__(self) -> None:
        if len(self.levels) != 3 or not 0 < self.levels[0] < self.levels[1] < self.levels[2]:
            raise UserError(
                f"`adapter.levels` {self.levels}: expected three layers of CLIP from 1, each above the one before"
            )
        in_range("adapter.expert_width", self.expert_width, 1, 2**17)
        in_range("adapter.resampler_tokens", self.resampler_tokens, 0, 2**14)
        for weight in self.weights or ():
            in_range("adapter.weights", weight, 0)
        if self.weights is not None and not sum(self.weights):
            raise UserError(
                f"`adapter.weights` {self.weights}: all 0; expected at least one above; leave them out for a router"
            )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warmup, then a cosine down to `final` x `rate` at step `decay_steps`. "muon" (Jordan et al., 2024) moves
    the matrices of blocks, experts and banks along orthogonalised momentum at `muon_rate`, the rest as AdamW does."""

    kind: Literal["adamw", "muon"] = "adamw"
    rate: float = 1e-4
    muon_rate: float = 0.02
    warmup: int = 1000  # steps
    decay_steps: int = 100_000  # of the schedule; apart from `steps`, so that a run can be made longer
    final: float = 0.1
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.01  # of matrices, by their logical axes; scales, biases and learned tokens have none
    clip: float = 1.0  # of the global gradient norm
    ema: float = 0.999  # decay of the averaged weights, warmed up as (1 + n) / (10 + n)

    def __post_init__(self) -> None:
        for name in ("rate", "muon_rate"):
            in_range(f"optim.{name}", getattr(self, name), 0, above=True)
        for name in ("b1", "b2", "ema"):
            in_range(f"optim.{name}", getattr(self, name), 0, 0.9999999)
        in_range("optim.warmup", self.warmup, 0)
        if self.decay_steps <= self.warmup:
            raise UserError(
                f"`optim.decay_steps` {self.decay_steps}: expected more than `optim.warmup`, {self.warmup}; the rate falls after it; "
                "raise one or lower the other"
            )
        in_range("optim.final", self.final, 0, 1)
        in_range("optim.weight_decay", self.weight_decay, 0)
        if not 0 < self.clip < math.inf:
            raise UserError(
                f"`optim.clip` {self.clip}: expected a norm above 0; for no clipping a large one, such as 1e9"
            )


@dataclass(frozen=True)
class SampleConfig:
    """The grid drawn while training: one row a prompt; columns reference, text only, DDS on, DDS off."""

    every: int = 0  # steps; 0 = never
    prompts: tuple[str, ...] = ()  # empty: the captions of the first rows of the dataset
    references: tuple[str, ...] = ()  # one picture a prompt; empty: the references of the first rows
    rows: int = 2  # how many, if they come from the dataset
    size: int = 512  # pixels a side
    steps: int = 20
    guidance: float = 3.5

    def __post_init__(self) -> None:
        in_range("sample.every", self.every, 0)
        in_range("sample.rows", self.rows, 1, 1024)
        in_range("sample.size", self.size, 16, 8192)
        in_range("sample.steps", self.steps, 1, 1000)
        in_range("sample.guidance", self.guidance, 0)


@dataclass(frozen=True)
class ValidationConfig:
    """The loss on held-out rows, of the averaged weights, at noise and times that stay the same: `validation_loss` in the metrics."""

    path: str = ""  # a folder written by `python -m train.prepare`, of other rows than those trained on
    every: int = 0  # steps; 0 = never
    batches: int = 4  # of as many rows as a micro-batch

    def __post_init__(self) -> None:
        in_range("validation.every", self.every, 0)


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of some steps in WORKDIR/profile, to be opened with TensorBoard or xprof."""

    start: int = 10  # the first step traced; earlier ones compile
    steps: int = 0  # how many; 0 = none


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes. On TPU pods all but `enabled` is found by itself."""

    enabled: bool = False
    coordinator: str = ""  # host:port of process 0
    processes: int = 0
    index: int = -1
    timeout: float = 60.0  # seconds without a sign of life from a process after which all others end


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Sizes are global: `batch` is split over the mesh's data and fsdp axes."""

    bundle: str = field(default="", metadata=RESUMABLE | PATH)  # the base model; empty = the embedded one
    data: DataConfig = field(default_factory=DataConfig, metadata=dict(resumable=("workers", "prefetch")))
    adapter: AdapterChoices = field(default_factory=AdapterChoices)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = _resumable(MeshConfig)
    sample: SampleConfig = _resumable(SampleConfig)
    validation: ValidationConfig = _resumable(ValidationConfig)
    profile: ProfileConfig = _resumable(ProfileConfig)
    distributed: DistributedConfig = _resumable(DistributedConfig)

    trainable: Literal["adapter", "base", "all"] = "adapter"  # "base": the transformer alone, without image prompt
    init_adapter: str = _resumable(
        ""
    )  # start from this adapter's weights, as python -m train.export wrote it; "": from random ones
    fresh_base: bool = False  # train the transformer from random weights instead of the bundle's
    steps: int = _resumable(100_000)
    batch: int = 16
    accumulate: int = 1  # micro-batches a step
    guidance: float = 1.0  # embedded in a guidance-distilled base
    random_granularity: float = 0.0  # share of samples with random weights of the levels, so that each also works alone
    time_mean: float = 0.0  # t = sigmoid(N(mean, std)), then the sampler's own shift
    time_std: float = 1.0
    fixed_noise: bool = False  # the same noise and times every step: to see whether a model can learn at all
    fixed_batch: bool = False  # the same batch every step
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of products and of frozen weights; trained ones are float32
    remat: Literal["none", "dots", "full"] = "full"
    seed: int = 0
    log_every: int = _resumable(10)
    save_every: int = _resumable(1000)
    keep: int = _resumable(2)  # latest checkpoints kept, besides the best

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` {getattr(self, name)}: expected at least 1")
        for name in ("guidance", "time_mean", "time_std"):
            in_range(name, getattr(self, name), -1e3 if name == "time_mean" else 0, 1e3, above=name == "time_std")
        in_range("seed", self.seed, 0, SEEDS)
        in_range("distributed.timeout", self.distributed.timeout, 0, 1e6, above=True)
        if not 0 <= self.random_granularity <= 1:
            raise UserError(f"`random_granularity` {self.random_granularity}: expected a share from 0 to 1")
        if self.batch % self.accumulate:
            raise UserError(
                f"`accumulate` {self.accumulate}: does not divide `batch` {self.batch}; choose one that does"
            )
        if self.fresh_base and self.trainable == "adapter":
            raise UserError(
                "`fresh_base`: a frozen base must not be random; pass `trainable` base or all, or leave it out"
            )
        if self.init_adapter and self.trainable == "base":
            raise UserError(
                f"`init_adapter` {self.init_adapter}: `trainable` base has no adapter to start; pass adapter or all, or leave it out"
            )
        if self.validation.every and not self.validation.path:
            raise UserError(
                f"`validation.every` {self.validation.every}: needs held-out rows; pass `validation.path`, a folder written by "
                "python -m train.prepare"
            )
        if self.validation.batches < 1:
            raise UserError(f"`validation.batches` {self.validation.batches}: expected at least 1")
        if self.profile.start < 1 or self.profile.steps < 0:
            raise UserError(
                f"`profile.start` {self.profile.start}, `profile.steps` {self.profile.steps}: expected a first step of at least 1 "
                "and a number of steps, 0 for no trace"
            )


def differing(old: Any, new: Any, prefix: str = "", resumable: Iterable[str] = ()) -> list[str]:
    """ "field: old -> new" for every field in which two configs differ and may not; `resumable` names more that may."""
    differences = []
    for f in sorted(fields(new), key=lambda f: f.name):
        path, a, b = f"{prefix}{f.name}", getattr(old, f.name), getattr(new, f.name)
        may_differ = f.metadata.get("resumable", ())
        moved = f.metadata.get("path") and bool(a) == bool(b)
        if may_differ is True or f.name in resumable or moved:
            continue
        if is_dataclass(b):
            differences += differing(a, b, f"{path}.", may_differ)
        elif a != b:
            differences.append(f"{path}: {a!r} -> {b!r}")
    return differences


def moved(old: Any, new: Any, prefix: str = "") -> list[str]:
    """ "field: old -> new" for every path of data or bundle that is another one, but for how it is written."""
    lines = []
    for f in fields(new):
        a, b = getattr(old, f.name), getattr(new, f.name)
        if is_dataclass(b):
            lines += moved(a, b, f"{prefix}{f.name}.")
        elif f.metadata.get("path"):
            old_path, new_path = (
                " ".join(p.rstrip("/") for p in (x if isinstance(x, tuple) else (x,))) for x in (a, b)
            )
            if old_path != new_path:
                lines.append(f"{prefix}{f.name}: {old_path} -> {new_path}")
    return lines


def load(path: Path) -> TrainConfig:
    """The `CONFIG` of a recipe file. Raises `UserError` if there is none."""
    if not is_file(path):
        raise UserError(f"`config` {path}: no such file; expected a recipe, such as configs/debug.py")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as e:  # a recipe is the user's own code
        raise UserError(f"`config` {path}: cannot be run ({type(e).__name__}: {e}); correct it") from e
    config = getattr(module, "CONFIG", None)
    if not isinstance(config, TrainConfig):
        raise UserError(f"`config` {path}: has no CONFIG = TrainConfig(...); see configs/debug.py")
    return config


def override(config: TrainConfig, words: Sequence[str]) -> TrainConfig:
    """`config` with the fields that `words` (--any.field value ...) set; --help lists all, with the comments in this file, and exits.

    Raises `UserError` for a word that does not fit.
    """
    from tyro import conf

    see = "python -m train.main --config CONFIG"
    return run_tyro(TrainConfig, words, see=see, default=config, prog="train.main", config=(conf.AvoidSubcommands,))
