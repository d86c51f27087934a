"""What families of multimodal diffusion transformers with double and single blocks have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from dynaip_jax.errors import UserError
from dynaip_jax.families.base import Family
from dynaip_jax.types import Sites


class MMDiT(Family):
    """A family whose transformer is made of `models/mmdit.py`."""

    blocks = ("double_blocks", "single_blocks")

    def check_widths(self, where: Any, widths: Iterable[tuple[str, int, int]]) -> None:
        """`widths`: what, how many numbers the transformer takes, how many there are. Raises `UserError` where they differ."""
        for what, needed, given in widths:
            if needed != given:
                raise UserError(
                    f"{where}: {what} is {given}, the transformer takes {needed}; convert parts that belong together"
                )

    @property
    def takes_guidance(self) -> bool:
        """True where guidance is distilled into an input."""
        return self.config("transformer").guidance_embed

    @property
    def sites(self) -> Sites:
        """Its double and its single blocks."""
        c = self.config("transformer")
        return Sites(c.depth, c.depth_single_blocks, c.num_heads, c.head_dim, c.hidden_size)

    def fresh(self, params: Any) -> Any:
        """Blocks do nothing yet and the velocity is 0: adaLN-Zero, Peebles & Xie, arXiv 2212.09748."""

        def start(path: Any, x: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(path)
            return jnp.zeros_like(x) if "mod" in name or "final_linear" in name else x

        return jax.tree_util.tree_map_with_path(start, params)

    def flops_of(self, image_rows: int, text_rows: int, products: int, modulations: int) -> int:
        """FLOPs of one forward pass: `products` between width and MLP in a block, and `modulations`, vectors of the width, in all."""
        c = self.config("transformer")
        w, n = c.hidden_size, image_rows + text_rows
        row = 2 * w * (3 * w + w + products * c.mlp_dim)  # qkv, projection, MLP: the same in both kinds of block
        attention = 4 * n * n * w
        ends = 2 * w * (image_rows * (c.in_channels + c.out_channels) + text_rows * c.context_in_dim)
        return (c.depth + c.depth_single_blocks) * (n * row + attention) + 2 * w * w * modulations + ends
