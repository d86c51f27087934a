"""An adapter of `python -m train.export` in PyTorch, with torch and safetensors alone.

adapter = Adapter("adapters/mine")
banks, routing = adapter([states[n] for n in adapter.levels])  # transformers' clip_vision(..., output_hidden_states=True).hidden_states

`banks`: of dual-stream blocks, then (if it acts there) single-stream ones: keys and values `[blocks, b, heads, m, head size]`. Block n
adds `scale * scaled_dot_product_attention(query, keys[n], values[n])` to the heads of its joint attention, before its output projection;
`query` is its own, normed, before RoPE. Text rows get another scale: 0 is DDS. docs/method.md has the equations.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


class Adapter:
    def __init__(self, folder):
        self.hmoe = json.loads((Path(folder) / "adapter.json").read_text())["config"]["hmoe"]
        self.weights, self.levels = load_file(Path(folder) / "adapter.safetensors"), self.hmoe["levels"]

    def linear(self, x, name):  # kernels are [in, out], and heads have an axis of their own
        kernel, bias = self.weights[f"hmoe.{name}.kernel"], self.weights[f"hmoe.{name}.bias"]
        return x @ kernel.reshape(x.shape[-1], -1) + bias.flatten()

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], *(self.weights[f"hmoe.{name}.{p}"] for p in ("scale", "bias")), 1e-6)

    def mlp(self, x, norm, first, last):
        return self.linear(F.gelu(self.linear(self.norm(x, norm), first), approximate="tanh"), last)

    def route(self, features):  # [b, 1, 3], or of the router "token" [b, m, 3]
        x, fixed = torch.cat(features, -1), self.hmoe["weights"]
        if fixed is not None:
            return (torch.tensor(fixed) / sum(fixed)).expand(*x.shape[:2], 3)
        x = x.mean(1, keepdim=True) if self.hmoe["router"] == "image" else x
        return self.linear(self.norm(x, "router_norm"), "router").softmax(-1)

    def resample(self, tokens, r="resampler"):
        x, heads = self.weights[f"hmoe.{r}.queries"].expand(len(tokens), -1, -1), self.hmoe["resampler_heads"]
        for n in range(self.hmoe["resampler_depth"]):
            rows = dict.fromkeys(("key", "value"), self.norm(tokens, f"{r}.token_norm_{n}"))
            rows = {"query": self.norm(x, f"{r}.query_norm_{n}")} | rows
            qkv = (self.linear(y, f"{r}.{p}_{n}").unflatten(-1, (heads, -1)).transpose(1, 2) for p, y in rows.items())
            x = x + self.linear(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2), f"{r}.out_{n}")
            x = x + self.mlp(x, f"{r}.mlp_norm_{n}", f"{r}.mlp_in_{n}", f"{r}.mlp_out_{n}")
        return x

    def bank(self, tokens, kind):
        k, v = (torch.einsum("bmw,lwhd->lbhmd", tokens, self.weights[f"{kind}.{name}"]) for name in ("key", "value"))
        return F.rms_norm(k, k.shape[-1:], eps=1e-6) * self.weights[f"{kind}.key_norm"][:, None, None, None], v

    def __call__(self, features):
        routing, experts = self.route(features), [f"expert_{name}" for name in ("low", "mid", "high")]
        each = zip(features, experts, routing[..., None].unbind(-2), strict=True)
        tokens = sum(w * self.mlp(x, f"{e}.norm", f"{e}.in_layer", f"{e}.out_layer") for x, e, w in each)
        tokens = self.resample(tokens) if self.hmoe["resampler_tokens"] else tokens
        return [self.bank(tokens, kind) for kind in ("double", "single") if f"{kind}.key" in self.weights], routing
