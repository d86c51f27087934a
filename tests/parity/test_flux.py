"""The transformer against BFL's own outputs (fixtures) and against diffusers, random weights, float32 on CPU.

Tolerance: max |ours - theirs| <= 1e-4 of max |theirs|; what is seen is about 2e-6, the rounding of float32.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel

from dynaip_jax import flow
from dynaip_jax.errors import UserError
from dynaip_jax.layers.compute import Compute
from dynaip_jax.layers.packing import image_ids
from dynaip_jax.layers.positions import rope_table
from dynaip_jax.layers.step_cache import StepCache
from dynaip_jax.models.flux import Flux, FluxConfig
from dynaip_jax.storage.tensors import TensorFile
from tests.conftest import FIXTURES
from tools.convert_torch_weights import engine
from tools.convert_torch_weights import flux as convert_flux

SIZES = dict(
    in_channels=16,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=3,
    joint_attention_dim=20,
    pooled_projection_dim=12,
    axes_dims_rope=(4, 6, 6),
)


def assert_close(ours, theirs, tolerance=1e-4):
    theirs = np.asarray(theirs)
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.abs(theirs).max()


def torch_model(**changes):
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**{**SIZES, "guidance_embeds": True, **changes}).eval()
    for p in model.parameters():  # norms and biases too, so that no term hides behind a one or a zero
        torch.nn.init.normal_(p, 0.3 if p.ndim == 1 else 0.0, 0.15)
    return model


def inputs(config, batch=2, rows=(4, 6), text=5):
    rng = np.random.default_rng(1)
    i = rows[0] * rows[1]
    values = {
        k: rng.normal(size=s.shape).astype(np.float32) for k, s in Flux.inputs_spec(config, batch, i, text).items()
    }
    values["img_ids"] = image_ids(rows[0] * 2, rows[1] * 2)
    values["txt_ids"] = np.zeros((1, text, 3), np.float32)
    values["timesteps"] = np.array([0.9, 0.13], np.float32)[:batch]
    if config.guidance_embed:
        values["guidance"] = np.array([3.5, 1.0], np.float32)[:batch]
    return values


def run_torch(model, x, dtype=torch.float32):
    def t(name, to=dtype):
        return torch.tensor(x[name]).to(to) if name in x else None

    with torch.no_grad():
        out = model(
            hidden_states=t("img"),
            encoder_hidden_states=t("txt"),
            pooled_projections=t("pooled"),
            timestep=t("timesteps", torch.float32),
            guidance=t("guidance", torch.float32),
            img_ids=t("img_ids")[0],
            txt_ids=t("txt_ids")[0],
        )
    return out.sample.float().numpy()


@pytest.mark.parametrize("family", ["dev", "schnell"])
def test_velocity_of_bfl_fixture(family):
    file = TensorFile(FIXTURES / f"flux_{family}_tiny_bfl.safetensors.index.json")
    config = FluxConfig(**json.loads(file.metadata["config"]))
    params = convert_flux.params_from_torch(
        {n.removeprefix("weights."): file[n] for n in file if n.startswith("weights.")}, config
    )
    x = {n.removeprefix("in."): file[n] for n in file if n.startswith("in.")}
    out = Flux(config).apply(
        {"params": params}, x["img"], x["img_ids"], x["txt"], x["txt_ids"], x["timesteps"], x["y"], x.get("guidance")
    )
    assert_close(out, file["out.velocity"])


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("kernel", ["xla", "per_head"])
def test_velocity_of_diffusers(guidance, kernel):
    model = torch_model(guidance_embeds=guidance)
    config = convert_flux.config_from_diffusers(dict(model.config))
    params = convert_flux.params_from_torch(model.state_dict(), config)
    x = inputs(config)
    assert_close(jax.jit(Flux(config, Compute(attention=kernel)).apply)({"params": params}, **x), run_torch(model, x))


def test_bfloat16_is_as_near_to_float32_as_torchs_is():
    model = torch_model()
    config = convert_flux.config_from_diffusers(dict(model.config))
    params = convert_flux.params_from_torch(model.state_dict(), config)
    x = inputs(config)
    x["guidance"] = np.array([4.0, 1.0], np.float32)  # exact in bfloat16: torch rounds guidance itself
    x["timesteps"] = np.array([0.5, 0.125], np.float32)
    exact = run_torch(model, x)
    theirs = run_torch(model.bfloat16(), x, torch.bfloat16)
    ours = Flux(config, Compute(dtype=jnp.bfloat16)).apply(
        {"params": jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), params)}, **x
    )
    ours, theirs = (np.sqrt(np.mean((np.asarray(y) - exact) ** 2)) for y in (ours, theirs))
    assert 0 < ours <= 1.5 * theirs


@pytest.mark.parametrize("threshold, whole", [(0.05, 24), (0.7, 18), (9.0, 1)])
def test_step_cache_of_diffusers(threshold, whole):
    """24 Euler steps with First Block Cache: the same latents, and as many steps that ran all blocks."""
    model, times = torch_model(), np.linspace(1, 0, 25, dtype=np.float32)
    config = convert_flux.config_from_diffusers(dict(model.config))
    params = convert_flux.params_from_torch(model.state_dict(), config)
    x = inputs(config)
    cache = StepCache.empty((*x["img"].shape[:2], config.hidden_size), jnp.float32, jnp.float32(threshold))

    def velocity(img, t, _, cache):
        now = x | dict(img=img, timesteps=jnp.full(len(img), t))
        return Flux(config).apply({"params": params}, **now, cache=cache)

    ours, cache = jax.jit(flow.euler, static_argnums=0)(velocity, x["img"], times, cache)

    runs = []
    model.single_transformer_blocks[-1].norm.register_forward_hook(lambda *_: runs.append(1))
    model.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    theirs = x["img"]
    with model.cache_context("prompt"):
        for t, following in zip(times[:-1], times[1:], strict=True):
            now = x | dict(img=theirs, timesteps=np.full(len(theirs), t))
            theirs = theirs + (following - t) * run_torch(model, now)
    assert 24 - cache.reused == len(runs) == whole
    assert_close(ours, theirs)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_value(remat):
    config = FluxConfig.tiny()
    x = inputs(config)
    params = Flux(config).init(jax.random.key(0), **x)
    again = Flux(FluxConfig.tiny(), Compute(remat=remat)).apply(params, **x)
    np.testing.assert_allclose(Flux(config).apply(params, **x), again, rtol=1e-5, atol=1e-6)


def test_full_size_names_and_shapes():
    bfl = json.loads((FIXTURES / "full_size_keys_bfl.json").read_text())["flux1_dev_bfl"]
    for config, guidance in ((FluxConfig.dev(), True), (FluxConfig.schnell(), False)):
        target = convert_flux.target(config)
        for layout in ("bfl", "diffusers"):
            table = convert_flux.table(config, layout)
            assert set(table) == set(target)
            source = engine.source_shapes(table)
            if layout == "bfl":
                expected = {n: tuple(s) for n, s in bfl.items() if guidance or not n.startswith("guidance_in")}
            else:
                with torch.device("meta"):
                    model = FluxTransformer2DModel(guidance_embeds=guidance)
                expected = {n: tuple(p.shape) for n, p in model.state_dict().items()}
            assert source == expected
            assert sum(np.prod(s) for s in source.values()) == sum(np.prod(s.shape) for s in target.values())
    shapes = {f"model.diffusion_model.{n}": tuple(s) for n, s in bfl.items()}
    assert convert_flux.config_from_bfl(shapes) == FluxConfig.dev()


def test_community_prefix_and_every_kind_of_mismatch():
    model = torch_model()
    config = convert_flux.config_from_diffusers(dict(model.config))
    good = {n: p.numpy() for n, p in model.state_dict().items()}
    plain = convert_flux.params_from_torch(good, config)
    prefixed = convert_flux.params_from_torch({f"model.diffusion_model.{n}": p for n, p in good.items()}, config)
    jax.tree.map(np.testing.assert_array_equal, plain, prefixed)

    name = "transformer_blocks.1.attn.to_q.weight"
    with pytest.raises(UserError, match=rf"1 missing: {name} \[48, 48\].*1 unexpected: surplus \[2\]"):
        convert_flux.params_from_torch({n: p for n, p in good.items() if n != name} | {"surplus": np.zeros(2)}, config)
    with pytest.raises(UserError, match=rf"wrong shape: {name}: found \[3, 3\], expected \[48, 48\]"):
        convert_flux.params_from_torch(good | {name: np.zeros((3, 3))}, config)
    with pytest.raises(UserError, match=f"{name} holds NaN"):
        convert_flux.params_from_torch(good | {name: good[name] * np.nan}, config)
    with pytest.raises(UserError, match="neither BFL's"):
        convert_flux.params_from_torch({"unet.weight": np.zeros(2)}, config)


def test_guidance_that_does_not_fit_the_model():
    for config in (FluxConfig.tiny(), FluxConfig.tiny(guidance_embed=False)):
        x = inputs(config)
        x["guidance"] = None if config.guidance_embed else np.ones(2, np.float32)
        with pytest.raises(ValueError, match="guidance must be"):
            Flux(config).init(jax.random.key(0), **x)


def test_rope_stays_exact_where_bfloat16_would_not():
    ids = np.full((1, 1, 1), 3001.0, np.float32)
    cos, _ = rope_table(ids, (2,), 10_000)
    assert abs(float(cos[0, 0, 0]) - np.cos(3001.0)) < 1e-4
