"""The attention kernels behind `ops.attention`, and which of them fits a call.

All take `q` `[b, n, h, d]`, `k`, `v` `[b, m, h, d]` and the scale of the logits. "xla" and "per_head" also take a bias
`[1 or b, h or 1, n, m]` and values of another size than the keys'.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dynaip_jax.choices import KERNELS
from dynaip_jax.errors import UserError
from dynaip_jax.runtime.sharding import platform, spec
from dynaip_jax.types import Tensor

PLATFORM = {"splash": "tpu", "cudnn": "gpu"}  # the others run anywhere
HEAD_SIZES = (128, 256)  # of splash: multiples of 128 whose blocks fit a TPU core's own memory
LANES = 128  # splash: lengths are padded to multiples of it
BLOCKS = (1024, 768, 512, 384, 256, 128)  # splash: rows of q and of k held at once, the largest that divides a length
WORTH = 512 * 512  # logits a head from which a fused kernel is taken by "auto"


def choose(kernel: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> str:
    """The name of the kernel for a call: `kernel` itself, or for "auto" the fastest that fits the platform and the call.

    Raises `UserError` for a kernel asked for by name that does not fit, and for one that does not exist.
    """
    if kernel not in KERNELS:
        raise UserError(f"attention {kernel!r}: expected one of {', '.join(KERNELS)}")
    here = platform()
    if kernel != "auto":
        if problem := _problem(kernel, here, q, k, v, bias):
            raise UserError(f"attention {kernel!r}: {problem}; use 'auto'")
        return kernel
    fused = next((name for name, where in PLATFORM.items() if where == here), None)
    if fused and q.shape[1] * k.shape[1] >= WORTH and not _problem(fused, here, q, k, v, bias):
        return fused
    return "per_head" if here == "cpu" else "xla"


def _problem(kernel: str, here: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> str | None:
    """Why `kernel` cannot serve a call; None if it can."""
    if kernel not in PLATFORM:
        return None
    if PLATFORM[kernel] != here:
        return f"needs a {PLATFORM[kernel].upper()}, this program is for {here.upper()}"
    if bias is not None:
        return "takes no bias"
    if v.shape != k.shape:
        return f"values of size {v.shape[-1]} for keys of size {k.shape[-1]}; takes equal ones"
    d = q.shape[-1]
    if kernel == "splash" and d not in HEAD_SIZES:
        return f"head size {d}; takes {' or '.join(map(str, HEAD_SIZES))}"
    if kernel == "cudnn" and (d % 8 or d > 128 or q.dtype not in (jnp.bfloat16, jnp.float16)):
        return f"head size {d} in {q.dtype}; takes multiples of 8 up to 128 in bfloat16 or float16"
    return None


def xla(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, bias: jax.Array | None = None) -> jax.Array:
    """Products and softmax as the compiler arranges them; the softmax in float32."""
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        logits = logits + bias
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v)


def per_head(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, bias: jax.Array | None = None) -> jax.Array:
    """One head of one sample at a time: faster on CPU and light on memory."""
    b, n, h, _ = q.shape
    bias = None if bias is None else jnp.asarray(bias)

    def one(head):
        index, q, k, v = head
        logits = jnp.einsum("nd,md->nm", q, k, preferred_element_type=jnp.float32) * scale
        if bias is not None:
            logits = logits + bias[index // h % bias.shape[0], index % h % bias.shape[1]]
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        return jnp.matmul(weights, v, preferred_element_type=jnp.float32).astype(v.dtype)

    heads = (jnp.swapaxes(x, 1, 2).reshape(b * h, *x.shape[1::2]) for x in (q, k, v))
    out = jax.lax.map(one, (jnp.arange(b * h), *heads))
    return jnp.swapaxes(out.reshape(b, h, n, -1), 1, 2)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """cuDNN's flash attention, which JAX partitions over batch and heads."""
    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")


def splash(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, *, interpret: bool = False) -> jax.Array:
    """JAX's Pallas kernel for TPU, each device on its own samples and heads; lengths are padded to multiples of `LANES`.

    `interpret` runs it without a TPU, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as sa

    n, m = q.shape[1], k.shape[1]
    rows, keys = (-(-x // LANES) * LANES for x in (n, m))
    block_q, block_kv = (next(b for b in BLOCKS if x % b == 0) for x in (rows, keys))
    sizes = sa.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_q_dkv=block_q, block_kv_dkv=block_kv, block_q_dq=block_q,
        block_kv_dq=block_kv, block_kv_dkv_compute=block_kv,
    )  # fmt: skip
    segments = None
    if keys != m:  # no row may see the padding
        segments = sa.SegmentIds(q=jnp.zeros(rows, jnp.int32), kv=(jnp.arange(keys) >= m).astype(jnp.int32))

    def local(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q = (q.astype(jnp.float32) * scale).astype(q.dtype)
        q, k, v = (
            jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, size - x.shape[1]), (0, 0)))
            for x, size in ((q, rows), (k, keys), (v, keys))
        )
        mask = sa.MultiHeadMask([sa.FullMask((rows, keys))] * q.shape[1])
        kernel = sa.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
        out = jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, segments)
        return jnp.swapaxes(out[:, :, :n], 1, 2)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q, k, v)
    parts = tuple(spec(("batch", None, "heads", None), x.shape, mesh) for x in (q, k, v))
    # check_vma=False: the kernel does not say over which axes its results vary
    return jax.shard_map(local, in_specs=parts, out_specs=parts[0], check_vma=False)(q, k, v)
