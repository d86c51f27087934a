"""Where a backbone's blocks read an `ImagePrompt`: one function that every block calls, whatever the backbone or the adapter.

Source of the equations: docs/method.md, "Injection". The place of adding "residual" is that of XLabs' adapters: x-flux
`IPDoubleStreamBlockProcessor`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dynaip_jax import choices
from dynaip_jax.layers import regions
from dynaip_jax.layers.attention import attention
from dynaip_jax.layers.positions import apply_rope
from dynaip_jax.layers.regions import RegionScores
from dynaip_jax.runtime.sharding import HEADS, constrain
from dynaip_jax.types import KV, ImagePrompt, Tensor


class Seen(NamedTuple):
    """What a block's injection took in and gave: `query` `[b, n, h, d]` and `gain` `[b, n, s]` of its rows, text rows first, the `term`
    `[b, n, h, d]` that was added, and the `region` `[b, s, i]` in the gain (None: 1 everywhere)."""

    query: jax.Array
    gain: jax.Array
    term: jax.Array
    region: jax.Array | None


@dataclass(frozen=True)
class Injection:
    """How blocks compute the reference term and where they add it, as the adapter was trained.

    - `query`, one of `choices.QUERIES`: the block's normed query before RoPE or after it;
    - `merge`, one of `choices.MERGES`: whether subjects are summed or compete in one softmax ("concat");
    - `site`, one of `choices.SITES`: added to the heads before the block's output projection, so that projection and gate apply
      (DynaIP, InstantX), or ungated to the stream after the block ("residual", XLabs);
    - `sharpness`: exponent of `regions.auto_region`; 0 gives every subject the same share everywhere.

    The kernel is the network's own (`Compute.attention`). Raises `ValueError` for a choice that does not exist.
    """

    query: str = "before_rope"
    merge: str = "sum"
    site: str = "before_projection"
    sharpness: float = 6.0

    def __post_init__(self) -> None:
        for name, allowed in dict(query=choices.QUERIES, merge=choices.MERGES, site=choices.SITES).items():
            choices.check(name, getattr(self, name), allowed)


class BlockPrompt(NamedTuple):
    """One block's share of an `ImagePrompt`: keys and values `[b, s, m, h, d]`, gains `[b, s]`."""

    kv: KV
    image_gain: jax.Array
    text_gain: jax.Array


class Places(NamedTuple):
    """What all blocks know of where subjects belong: `given` regions `[b, s, i]` or None; to find them in the blocks, `words`
    `[b, s, t]` and what smooths their scores, `[b, i, i]`."""

    given: jax.Array | None
    words: jax.Array | None = None
    smoothing: jax.Array | None = None


class Shares(NamedTuple):
    """An `ImagePrompt` as a backbone hands it out: to the dual-stream blocks and the single-stream ones (stacked, or None), to all,
    and what they carry from one to the next (None where regions are not to be evidence)."""

    double: BlockPrompt | None
    single: BlockPrompt | None
    places: Places
    evidence: RegionScores | None


class Rows(NamedTuple):
    """A block's queries and keys `[b, n, h, d]`, text rows first: the normed query, and both after RoPE."""

    query: jax.Array
    rotated: jax.Array
    keys: jax.Array
    text: int  # how many rows are text


def shares(
    prompt: ImagePrompt | None,
    double: int,
    single: int,
    head: tuple[int, int],
    ids: jax.Array,
    batch: int,
    text_rows: int,
) -> Shares:
    """The shares of a backbone with so many `double` and `single` blocks of `head` = (heads, head size); `ids` `[1 or b, i, axes]`:
    positions of the image rows. Raises `ValueError` for an image prompt of another base, of another number of text rows, or
    with both regions and words."""
    if prompt is None:
        return Shares(None, None, Places(None), None)
    for kind, kv, depth in (("double", prompt.double, double), ("single", prompt.single, single)):
        if kv is not None and (kv.k.shape[0], *kv.k.shape[-2:]) != (depth, *head):
            raise ValueError(
                f"image prompt for {kind} blocks: blocks, heads, head size {(kv.k.shape[0], *kv.k.shape[-2:])}; "
                f"this transformer has {(depth, *head)}: the adapter was made for another base"
            )
    injected = double + (0 if prompt.single is None else single)
    if prompt.image_gain.shape[0] != injected or prompt.text_gain.shape[0] != injected:
        raise ValueError(f"image prompt: gains for {prompt.image_gain.shape[0]} blocks, expected {injected}")
    of_double = BlockPrompt(prompt.double, prompt.image_gain[:double], prompt.text_gain[:double])
    of_single = None
    if prompt.single is not None:
        of_single = BlockPrompt(prompt.single, prompt.image_gain[double:], prompt.text_gain[double:])
    words = _words(prompt, text_rows)
    if words is None:
        return Shares(of_double, of_single, Places(prompt.region), None)
    scores = jnp.zeros((batch, words.shape[1], ids.shape[1]))
    places = Places(prompt.region, words, regions.smoothing_matrix(ids))
    return Shares(of_double, of_single, places, RegionScores(scores, jnp.zeros(())))


def _words(prompt: ImagePrompt, text_rows: int) -> jax.Array | None:
    """The words by which regions are to be found; None if they are not."""
    words = prompt.words
    if words is None:
        return None
    if prompt.region is not None:
        raise ValueError("image prompt: has both regions and words; expected one of them at most")
    expected = (prompt.image_gain.shape[-1], text_rows)
    if words.shape[-2:] != expected:
        raise ValueError(f"image prompt: words for subjects, text rows {words.shape[-2:]}; expected {expected}")
    return words if words.shape[-2] > 1 else None  # one subject has every row to itself


def reference_term(
    injection: Injection,
    kernel: str,
    rows: Rows,
    prompt: BlockPrompt | None,
    places: Places,
    evidence: RegionScores | None,
    keep: Callable[[Seen], object] | None = None,
) -> tuple[jax.Array | None, RegionScores | None]:
    """What the subjects give a block, `[b, n, h, d]` (None without a prompt), and `evidence` with what this block adds to it. `keep` is
    called with what was seen."""
    if prompt is None:
        return None, evidence
    b, n = rows.query.shape[:2]
    region = places.given
    if evidence is not None and places.words is not None and places.smoothing is not None:
        image, text = rows.rotated[:, rows.text :], rows.keys[:, : rows.text]
        scores = regions.word_scores(image, text, places.words, places.smoothing, kernel)
        evidence = RegionScores(evidence.scores + scores, evidence.blocks + 1)
        region = regions.auto_region(evidence.scores / evidence.blocks, injection.sharpness)
    gain = jnp.concatenate(
        [row_gain(prompt.text_gain, None, b, rows.text), row_gain(prompt.image_gain, region, b, n - rows.text)], axis=1
    )
    query = rows.rotated if injection.query == "after_rope" else rows.query
    term = reference_attention(query, prompt.kv, gain, injection.merge, kernel)
    if keep is not None:
        keep(Seen(query, gain, term, region))
    return term, evidence


def joint_attention(
    injection: Injection,
    kernel: str,
    qkv: Sequence[jax.Array],
    rope: tuple[jax.Array, jax.Array],
    places: Places,
    prompt: BlockPrompt | None,
    evidence: RegionScores | None,
    text_rows: int,
    own: int | None = None,
    keep: Callable[[Seen], object] | None = None,
) -> tuple[jax.Array, jax.Array | None, RegionScores | None]:
    """Heads `[b, n, h, d]` of a block's joint attention with RoPE, with the reference term where it is added there; the term itself,
    whose keys stand at position 0; and `evidence` with what this block adds to it.

    `qkv`: normed, `[b, n, h, d]` each, text rows first; the term acts on the first `own` rows (None: on all) and is 0 in the others;
    `keep` is called with what it was made of.
    """
    q, k, v = (constrain(x, *HEADS) for x in qkv)
    rotated, keys = apply_rope(q, rope), apply_rope(k, rope)
    heads = attention(rotated, keys, v, kernel=kernel)
    rows = Rows(q[:, :own], rotated[:, :own], keys[:, :own], text_rows)
    term, evidence = reference_term(injection, kernel, rows, prompt, places, evidence, keep)
    if term is not None and term.shape[1] < heads.shape[1]:
        term = jnp.pad(term, ((0, 0), (0, heads.shape[1] - term.shape[1]), (0, 0), (0, 0)))
    return before_projection(injection, heads, term), term, evidence


def before_projection(injection: Injection, heads: jax.Array, term: jax.Array | None) -> jax.Array:
    """The joint attention's `heads` `[b, n, h, d]`, with the reference term if this is its place."""
    return heads if term is None or injection.site != "before_projection" else heads + term


def after_block(injection: Injection, stream: jax.Array, term: jax.Array | None) -> jax.Array:
    """A block's outgoing `stream` `[b, n, c]`, with the reference term of its rows `[b, n, h, d]` if this is its place."""
    return stream if term is None or injection.site != "residual" else stream + term.reshape(stream.shape)


def reference_attention(
    q: Float[Tensor, "b n h d"], kv: KV, gain: Float[Tensor, "b n s"], merge: str = "sum", kernel: str = "auto"
) -> Float[jax.Array, "b n h d"]:
    """Sum over subjects of gain · softmax(q K_sᵀ/√d) V_s: `q` `[b, n, h, d]`, K and V `[b or 1, s, m, h, d]` -> `[b, n, h, d]`.

    `gain` `[b, n, s]` weighs each subject in each row. The softmax runs over the tokens `m` of one subject (`merge` "sum", with
    `kernel` as in `attention`), or over those of all subjects, which then compete for a row ("concat"; the gain is then applied
    to the weights). Source: docs/method.md, "Injection".
    """
    b = q.shape[0]
    k, v = (jnp.broadcast_to(x, (b, *x.shape[1:])).astype(q.dtype) for x in kv)
    if merge == "concat":
        weights = reference_weights(q, k, merge) * gain[:, None, :, :, None]
        return jnp.einsum("bhnsm,bsmhd->bnhd", weights.astype(q.dtype), v)
    gain = gain.astype(q.dtype)
    terms = (attention(q, k[:, s], v[:, s], kernel=kernel) * gain[:, :, s, None, None] for s in range(k.shape[1]))
    return functools.reduce(jnp.add, terms)


def reference_weights(q: Float[Tensor, "b n h d"], k: jax.Array, merge: str = "sum") -> Float[jax.Array, "b h n s m"]:
    """The softmax of `reference_attention`, float32: rows sum to 1 over the tokens `m` of each subject, or with `merge` "concat" over
    those of all. `k` `[b or 1, s, m, h, d]`."""
    k = jnp.broadcast_to(k, (q.shape[0], *k.shape[1:])).astype(q.dtype)
    logits = jnp.einsum("bnhd,bsmhd->bhnsm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jax.nn.softmax(logits, axis=(-2, -1) if merge == "concat" else -1)


def row_gain(
    gain: Float[Tensor, "gains s"], region: Float[Tensor, "regions s {rows}"] | None, batch: int, rows: int
) -> Float[jax.Array, "{batch} {rows} s"]:
    """`[batch, rows, s]` from one block's gain `[b or 1, s]` and the region `[b or 1, s, rows]` (None: 1 everywhere)."""
    per_row = gain[:, None, :] if region is None else gain[:, None, :] * jnp.moveaxis(region, 1, 2)
    return jnp.broadcast_to(per_row, (batch, rows, gain.shape[-1]))
