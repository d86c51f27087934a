"""Quantised weights in safetensors and pickles: fp8 (raw, and scaled as Comfy has it), bitsandbytes' 4 and 8 bit, optimum-quanto's.

What a weight was is computed where it is read, in float32, from the tensors that lie beside it, which are left out themselves. Kinds
that are not undone here are refused by their names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from dynaip_jax import reading
from dynaip_jax.errors import UserError, shortened

KEPT = np.dtype(ml_dtypes.bfloat16)  # what a quantised weight is unless asked otherwise
FP8 = {np.dtype(ml_dtypes.float8_e4m3fn): "fp8 e4m3", np.dtype(ml_dtypes.float8_e5m2): "fp8 e5m2"}
FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")
TABLES = {kind: np.arange(256, dtype=np.uint8).view(kind).astype(np.float32) for kind in FP8}
STATE = ".quant_state.bitsandbytes__"
NESTED = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
SCALES = (".scale_weight", ".weight_scale")
ASIDE = (".scale_input", ".input_scale", ".output_scale", ".comfy_quant")  # of activations, and what says the kind
OTHERS = {  # what the name of a tensor ends in -> the kind of its weight
    "._weight_qdata": "torchao", ".wscales": "nunchaku's SVDQuant", ".weight_scale_2": "nvfp4", ".qzeros": "GPTQ or AWQ",
    ".weight._shift": "quanto with shifts",
}  # fmt: skip

Undo = Callable[[tuple[slice, ...]], np.ndarray]


class Dequantised(Mapping[str, np.ndarray]):
    """`tensors` with quantised weights undone. `precision` says what they are; `metadata` is a file's own.

    Raises `UserError` for kinds that are not read, by their names, and for tensors that do not belong together.
    """

    def __init__(self, tensors: Any, metadata: Mapping[str, str] | None = None):
        self._tensors = tensors
        self._undo: dict[str, Undo] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.metadata = dict(metadata or {})
        self._hidden: set[str] = set()
        kinds: set[str] = set()
        self._refuse_others()
        for name in tensors:
            if STATE in name:
                kinds.add(self._four_bits(*name.split(STATE)))
            elif name.endswith(".SCB"):
                kinds.add(self._eight_bits(name.removesuffix(".SCB")))
            elif name.endswith(".weight._data"):
                kinds.add(self._quanto(name.removesuffix("._data")))
            elif name.endswith(SCALES):
                kinds.add(self._scaled(name))
            elif name.split(".")[-1] == "scaled_fp8":
                self._hidden.add(name)
        for name in tensors:
            kind = FP8.get(tensors.dtype(name))
            if kind and name not in self._undo and name not in self._hidden:
                kinds.add(kind)
                self._undo[name] = partial(self._raw, name)
        if kinds:
            self._hidden |= {name for name in tensors if name.endswith(ASIDE)}
        self._names = [name for name in dict.fromkeys([*tensors, *self._undo]) if name not in self._hidden]
        rest = {str(tensors.dtype(name)) for name in self._names if name not in self._undo}
        self.precision = "+".join(sorted((kinds | rest) - {""}))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.part(name, ())

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor; float32 if it was quantised."""
        undo = self._undo.get(name)
        return self._tensors.part(name, index) if undo is None else undo(index)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, as it was before."""
        return self._shapes.get(name) or self._tensors.shape(name)

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor, bfloat16 if it was quantised."""
        return KEPT if name in self._undo else self._tensors.dtype(name)

    def _raw(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return _floats(self._tensors.part(name, index))

    def _refuse_others(self) -> None:
        for name in self._tensors:
            for end, kind in OTHERS.items():
                if name.endswith(end):
                    raise _unknown(name, kind)
            if name.endswith(".comfy_quant"):
                _check_comfy(name, self._json(name))
        if text := self.metadata.get("_quantization_metadata"):
            layers = _parsed("_quantization_metadata", text.encode()).get("layers")
            for name, layer in layers.items() if isinstance(layers, dict) else ():
                _check_comfy(name, layer)

    def _json(self, name: str) -> dict[str, Any]:
        data = np.asarray(self._tensors[name])
        if data.dtype != np.uint8 or data.size > 1 << 16:
            raise UserError(f"{name} holds {data.dtype}; expected bytes of JSON; download it again")
        return _parsed(name, data.tobytes())

    def _take(self, name: str, *dtypes: Any) -> np.ndarray:
        """A tensor beside a weight, which is left out."""
        if name not in self._tensors:
            raise UserError(f"{name} is missing; expected it beside the quantised weight; download it again")
        self._hidden.add(name)
        x = np.asarray(self._tensors[name])
        if dtypes and x.dtype not in [np.dtype(d) for d in dtypes]:
            raise UserError(f"{name} holds {x.dtype}; expected {np.dtype(dtypes[0])}; download it again")
        return x

    def _scaled(self, name: str) -> str:
        """Comfy's scaled fp8, old and new: `q * scale`, one a matrix or one a row."""
        base = name.removesuffix(".scale_weight").removesuffix(".weight_scale")
        weight = f"{base}.weight"
        scale = self._take(name).astype(np.float32)
        if weight not in self._tensors:
            raise UserError(f"{name} is beside no {weight}; expected both; download it again")
        kind, shape = self._tensors.dtype(weight), self._tensors.shape(weight)
        if kind not in FP8:
            if (scale == 1).all():  # some files have such beside layers that are not quantised
                return ""
            raise _unknown(weight, f"{kind} with a scale")
        if scale.size != 1 and scale.shape not in ((shape[0],), (shape[0], *(1,) * (len(shape) - 1))):
            raise _unknown(weight, f"{FP8[kind]} with scales {list(scale.shape)}")
        if not np.isfinite(scale).all():
            raise UserError(f"{name} holds NaN or infinity; expected finite scales; download it again")
        rows = np.broadcast_to(scale.reshape(-1), (shape[0],))

        def undo(index: tuple[slice, ...]) -> np.ndarray:
            q = _floats(self._tensors.part(weight, index))
            q *= rows[index[0] if index else slice(None)].reshape(-1, *(1,) * (len(shape) - 1))
            return q

        self._undo[weight] = undo
        return f"{FP8[kind]} scaled"

    def _quanto(self, weight: str) -> str:
        """optimum-quanto: `data * scale`, one a row."""
        data, scale = f"{weight}._data", self._take(f"{weight}._scale").astype(np.float32)
        self._hidden.add(data)
        kind, shape = self._tensors.dtype(data), self._tensors.shape(data)
        if kind not in (*FP8, np.dtype(np.int8)) or scale.size not in (1, shape[0]):
            raise _unknown(weight, f"quanto's {kind} with scales {list(scale.shape)}")
        rows = np.broadcast_to(scale.reshape(-1), (shape[0],))

        def undo(index: tuple[slice, ...]) -> np.ndarray:
            q = self._tensors.part(data, index)
            q = _floats(q) if kind in FP8 else q.astype(np.float32)
            return q * rows[index[0] if index else slice(None)].reshape(-1, *(1,) * (len(shape) - 1))

        if weight in self._tensors:
            raise UserError(f"{weight} is there plain and quantised; expected it once; use another file")
        self._undo[weight], self._shapes[weight] = undo, shape
        return f"quanto {FP8.get(kind, 'int8')}"

    def _eight_bits(self, base: str) -> str:
        """bitsandbytes' LLM.int8: `q * SCB / 127` a row."""
        weight, scale = f"{base}.weight", self._take(f"{base}.SCB").astype(np.float32)
        if f"{base}.weight_format" in self._tensors and self._take(f"{base}.weight_format", np.uint8).any():
            raise _unknown(weight, "bitsandbytes int8 in another order than rows")
        shape = self._tensors.shape(weight) if weight in self._tensors else ()
        if len(shape) != 2 or scale.shape != shape[:1] or self._tensors.dtype(weight) != np.int8:
            raise UserError(f"{weight}: expected int8 with a scale for each row (SCB); download it again")

        def undo(index: tuple[slice, ...]) -> np.ndarray:
            q = self._tensors.part(weight, index).astype(np.float32)
            q *= scale[index[0] if index else slice(None)][:, None] / np.float32(127)
            return q

        self._undo[weight] = undo
        return "bitsandbytes int8"

    def _four_bits(self, weight: str, kind: str) -> str:
        """bitsandbytes' nf4 and fp4: `map[nibble] * absmax`, high nibble first; absmax itself may be in 8 bits."""
        state = self._json(f"{weight}{STATE}{kind}")
        self._hidden.add(f"{weight}{STATE}{kind}")
        code = self._take(f"{weight}.quant_map", np.float32).reshape(-1)
        absmax = self._take(f"{weight}.absmax", np.float32, np.uint8).reshape(-1)
        block: Any = state.get("blocksize")
        shape: Any = state.get("shape")
        sizes = [block, *(shape if isinstance(shape, list) else [None])]
        if not all(type(n) is int and 0 < n < 1 << 32 for n in sizes) or code.size != 16:
            raise UserError(
                f"{weight}: blocksize {block}, shape {shape}; expected bitsandbytes' 4 bit; download it again"
            )
        size = int(np.prod(shape, dtype=np.int64))
        if absmax.dtype == np.uint8:
            absmax = self._nested(weight, absmax, state)
        stored = self._tensors.shape(weight) if weight in self._tensors else ()
        if int(np.prod(stored)) * 2 != size + size % 2 or absmax.size != -(-size // block) or not stored:
            raise UserError(
                f"{weight}: {list(stored)} does not hold {shape} in 4 bit; expected both halves; download it again"
            )

        def undo(index: tuple[slice, ...]) -> np.ndarray:
            packed = self._tensors[weight].reshape(-1).view(np.uint8)
            values = np.empty(packed.size * 2, np.float32)
            values[0::2], values[1::2] = code[packed >> 4], code[packed & 15]
            values = values[:size]
            whole = size // block * block
            values[:whole].reshape(-1, block)[...] *= absmax[: whole // block, None]
            values[whole:] *= absmax[-1]
            return values.reshape(shape)[index]

        self._undo[weight], self._shapes[weight] = undo, tuple(shape)
        return f"bitsandbytes {kind}"

    def _nested(self, weight: str, quantised: np.ndarray, state: Mapping[str, Any]) -> np.ndarray:
        outer = self._take(f"{weight}.nested_absmax", np.float32).reshape(-1)
        code = self._take(f"{weight}.nested_quant_map", np.float32).reshape(-1)
        block: Any = state.get("nested_blocksize")
        offset: Any = state.get("nested_offset")
        right = type(block) is int and block > 0 and isinstance(offset, int | float) and code.size == 256
        if not right or outer.size != -(-quantised.size // block):
            raise UserError(
                f"{weight}: its absmax is not as bitsandbytes nests it; expected whole tensors; download it again"
            )
        return code[quantised] * np.repeat(outer, block)[: quantised.size] + np.float32(offset)


def _floats(q: np.ndarray) -> np.ndarray:
    """fp8 as float32."""
    return TABLES[q.dtype][q.view(np.uint8)]


def _parsed(name: str, data: bytes) -> dict[str, Any]:
    try:
        value = reading.parse_json(data)
        if not isinstance(value, dict):
            raise ValueError("no object")
        return value
    except ValueError as e:
        raise UserError(f"{name}: {e}; expected JSON that says how the weights are quantised; download it again") from e


def _check_comfy(name: str, layer: Any) -> None:
    kind = layer.get("format") if isinstance(layer, dict) else None
    if kind not in FP8_FORMATS:
        raise _unknown(name, shortened(json.dumps(kind).strip('"'), 60))
    if layer.get("convrot"):
        raise _unknown(name, f"{kind} rotated (convrot)")


def _unknown(name: str, kind: str) -> UserError:
    return UserError(
        f"{name} is quantised as {kind}; expected plain weights, fp8, bitsandbytes' nf4 or int8, or GGUF; use another file of this model"
    )
