"""The model that a command is to use, as its arguments name it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dynaip_jax.commandline import argument

if TYPE_CHECKING:
    from dynaip_jax.sampling.opening import Opened

FILES = "model and file"  # a heading in help


@dataclass(frozen=True)
class Loading:
    """What a model is loaded from, and how."""

    model: str | None = argument(
        "converted base model", default=None, usual="the embedded one of Shapeland", unit="BUNDLE", group=FILES
    )
    adapter: str | None = argument(
        "trained adapter, or XLabs' or InstantX's file; without it plain text to image",
        default=None,
        unit="DIR_OR_FILE",
        group=FILES,
    )
    lora: tuple[str, ...] = argument(
        "a LoRA that is merged into the weights, as strongly as scale says (default 1); repeat for more",
        default=(),
        unit="FILE[=scale]",
        group=FILES,
        repeat=True,
    )
    any_base: bool = argument("accept an adapter trained on another base of the same sizes", default=False, group=FILES)
    dtype: Literal["float32", "bfloat16"] | None = argument(
        "of weights and activations", default=None, usual="float32 on CPU, bfloat16 elsewhere", group=FILES
    )
    mesh: str | None = argument(
        "devices that share the work, such as tensor=4 or data=2,fsdp=4",
        default=None,
        usual="one device",
        unit="AXES",
        group=FILES,
    )
    attention: Literal["auto", "xla", "per_head", "splash", "cudnn"] = argument(
        "kernel of the transformer", default="auto", group=FILES
    )
    weights: Literal["full", "int8", "fp8"] = argument(
        "of the transformer's blocks: 8 bits need half the memory, at an error (needs qwix)",
        default="full",
        group=FILES,
    )
    offload_text: bool = argument(
        "keep the large text encoder in the host's memory, on the device only while it encodes (T5-XXL: 9.5 GB less)",
        default=False,
        group=FILES,
    )


def open_for(args: Any, with_references: bool) -> Opened:
    """The model that the arguments of a command name, whose weights are still to be read; without one, the embedded model of Shapeland."""
    from dynaip_jax.runtime.sharding import parse_mesh
    from dynaip_jax.sampling.loras import parse as parse_lora
    from dynaip_jax.sampling.opening import open_model

    model: str | Path | None = args.model
    adapter: str | Path | None = args.adapter
    if model is None:
        from dynaip_jax.shapeland import default
        from dynaip_jax.shapeland.world import caption_words

        model, embedded = default.paths()
        adapter = adapter or (embedded if with_references else None)
        print(
            "note: using the embedded model of Shapeland, which knows these words: "
            f"{' '.join(caption_words())}; pass --model for another",
            file=sys.stderr,
        )
    return open_model(
        model,
        adapter,
        dtype=args.dtype,
        any_base=args.any_base,
        mesh=parse_mesh(args.mesh) if args.mesh else None,
        attention=args.attention,
        weights=args.weights,
        offload_text=args.offload_text,
        loras=[parse_lora(text) for text in args.lora],
    )
