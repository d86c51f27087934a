"""FLUX.2's transformer against diffusers, random weights, float32 on CPU.

Tolerance: max |ours - theirs| <= 1e-4 of max |theirs|; what is seen is about 2e-6, the rounding of float32, and with a guidance of 4
about 5e-5: torch rounds the frequencies of its sinusoids, of which 4000 periods are taken.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel

from dynaip_jax import flow
from dynaip_jax.errors import UserError
from dynaip_jax.layers.compute import Compute
from dynaip_jax.layers.step_cache import StepCache
from dynaip_jax.models.flux2 import Flux2, Flux2Config
from dynaip_jax.types import References
from tools.convert_torch_weights import engine
from tools.convert_torch_weights import flux2 as convert_flux2

SIZES = dict(
    in_channels=12,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=3,
    joint_attention_dim=20,
    axes_dims_rope=(4, 4, 4, 4),
)
KLEIN, DEV = False, True


def assert_close(ours, theirs, tolerance=1e-4):
    theirs = np.asarray(theirs)
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.abs(theirs).max()


def torch_model(guidance=KLEIN):
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(**SIZES, guidance_embeds=guidance).eval()
    for p in model.parameters():  # norms too, so that no term hides behind a one
        torch.nn.init.normal_(p, 0.3 if p.ndim == 1 else 0.0, 0.1)
    return model


def converted(model):
    config = convert_flux2.config_from_diffusers(dict(model.config))
    return config, convert_flux2.params_from_torch(model.state_dict(), config)


def grid(rows, columns, time=0):
    """Positions `[1, i, 4]`."""
    ids = np.stack(np.meshgrid([time], range(rows), range(columns), [0], indexing="ij"), axis=-1)
    return ids.reshape(1, -1, 4).astype(np.float32)


def inputs(config, batch=2, size=(4, 6), text=5):
    rng = np.random.default_rng(1)
    spec = Flux2.inputs_spec(config, batch, size[0] * size[1], text)
    values = {k: rng.normal(size=s.shape).astype(np.float32) for k, s in spec.items()}
    values["img_ids"] = grid(*size)
    values["txt_ids"] = np.pad(np.arange(text, dtype=np.float32)[None, :, None], ((0, 0), (0, 0), (3, 0)))
    values["timesteps"] = np.array([0.9, 0.13], np.float32)[:batch]
    if config.guidance_embed:
        values["guidance"] = np.array([4.0, 1.0], np.float32)[:batch]
    return values


def run_torch(model, x, dtype=torch.float32):
    def t(name, to=dtype):
        return torch.tensor(x[name]).to(to) if name in x else None

    with torch.no_grad():
        out = model(
            hidden_states=t("img"),
            encoder_hidden_states=t("txt"),
            timestep=t("timesteps", torch.float32),
            guidance=t("guidance", torch.float32),
            img_ids=t("img_ids", torch.float32),
            txt_ids=t("txt_ids", torch.float32),
        )
    return out.sample.float().numpy()


@pytest.mark.parametrize("guidance", [KLEIN, DEV], ids=["klein", "dev"])
@pytest.mark.parametrize("kernel", ["xla", "per_head"])
def test_velocity_of_diffusers(guidance, kernel):
    model = torch_model(guidance)
    config, params = converted(model)
    x = inputs(config)
    out = jax.jit(Flux2(config, Compute(attention=kernel)).apply)({"params": params}, **x)
    assert_close(out, run_torch(model, x))


def test_velocity_with_the_models_own_references():
    """Two reference pictures of other sizes: rows after the image's, at times 10 and 20, which give no velocity."""
    model = torch_model()
    config, params = converted(model)
    x = inputs(config)
    ids = np.concatenate([grid(2, 3, time=10), grid(3, 1, time=20)], axis=1)
    tokens = np.random.default_rng(2).normal(size=(1, 9, config.in_channels)).astype(np.float32)
    ours = jax.jit(Flux2(config).apply)({"params": params}, **x, references=References(np.repeat(tokens, 2, 0), ids))
    joined = x | dict(
        img=np.concatenate([x["img"], np.repeat(tokens, 2, 0)], axis=1),
        img_ids=np.concatenate([x["img_ids"], ids], axis=1),
    )
    theirs = run_torch(model, joined)
    assert_close(ours, theirs[:, :24])
    assert np.abs(theirs[:, :24] - run_torch(model, x)).max() > 1e-2


def test_bfloat16_is_as_near_to_float32_as_torchs_is():
    model = torch_model(DEV)
    config, params = converted(model)
    x = inputs(config)
    x["timesteps"] = np.array([0.5, 0.125], np.float32)  # exact in bfloat16: torch rounds times and guidance themselves
    exact = run_torch(model, x)
    theirs = run_torch(model.bfloat16(), x, torch.bfloat16)
    half = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), params)
    ours = jax.jit(Flux2(config, Compute(dtype=jnp.bfloat16)).apply)({"params": half}, **x)
    ours, theirs = (np.sqrt(np.mean((np.asarray(y) - exact) ** 2)) for y in (ours, theirs))
    assert 0 < ours <= 1.5 * theirs


@pytest.mark.parametrize("threshold", [0.05, 0.3, 9.0])
def test_step_cache_by_hand(threshold):
    """12 Euler steps with First Block Cache, against its rule applied to what torch's blocks give (diffusers' own hook fails on FLUX.2)."""
    model, times = torch_model(), np.linspace(1, 0, 13, dtype=np.float32)
    config, params = converted(model)
    x = inputs(config)
    cache = StepCache.empty((*x["img"].shape[:2], config.hidden_size), jnp.float32, jnp.float32(threshold))

    def velocity(img, t, _, cache):
        now = x | dict(img=img, timesteps=jnp.full(len(img), t))
        return Flux2(config).apply({"params": params}, **now, cache=cache)

    ours, cache = jax.jit(flow.euler, static_argnums=0)(velocity, x["img"], times, cache)
    theirs, reused = torch_with_cache(model, x, times, threshold)
    assert cache.reused == reused and (reused == 11 if threshold > 1 else 0 <= reused < 11)
    assert_close(ours, theirs)


def torch_with_cache(model, x, times, threshold):
    """The latents after `times`, and how many steps reused what the other blocks had added before."""
    seen = {}

    def keep(module, args, out):
        seen["first"] = out[1]

    def swap(module, args):
        """Before the last layer: image rows after all blocks, or those after the first with what was added before."""
        nonlocal reused
        first, rows = seen["first"] - seen["before"], args[0]
        if "old" in seen and (first - seen["old"]).abs().mean() <= threshold * seen["old"].abs().mean():
            reused += 1
            return seen["first"] + seen["rest"], *args[1:]
        seen["old"], seen["rest"] = first, rows - seen["first"]

    reused, latents = 0, x["img"]
    model.x_embedder.register_forward_hook(lambda module, args, out: seen.update(before=out))
    model.transformer_blocks[0].register_forward_hook(keep)
    model.norm_out.register_forward_pre_hook(swap)
    for t, following in zip(times[:-1], times[1:], strict=True):
        v = run_torch(model, x | dict(img=latents, timesteps=np.full(len(latents), t)))
        latents = latents + (following - t) * v
    return latents, reused


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_value(remat):
    config = Flux2Config.tiny()
    x = inputs(config)
    params = jax.jit(Flux2(config).init)(jax.random.key(0), **x)
    plain, again = (jax.jit(Flux2(config, Compute(remat=how)).apply)(params, **x) for how in ("none", remat))
    np.testing.assert_allclose(plain, again, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "config, tensors, sizes",
    [
        (Flux2Config.klein_4b(), 169, dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680)),
        (Flux2Config.klein_9b(), 233, dict(num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288)),
        (Flux2Config.dev(), 331, dict(num_layers=8, num_single_layers=48, num_attention_heads=48, joint_attention_dim=15360)),
    ],
)  # fmt: skip
def test_full_size_names_and_shapes(config, tensors, sizes):
    with torch.device("meta"):
        model = Flux2Transformer2DModel(**sizes, guidance_embeds=config.guidance_embed)
    assert convert_flux2.config_from_diffusers(dict(model.config)) == config
    expected = {n: tuple(p.shape) for n, p in model.state_dict().items()}
    target = convert_flux2.target(config)
    for layout in ("bfl", "diffusers"):
        table = convert_flux2.table(config, layout)
        assert set(table) == set(target)
        source = engine.source_shapes(table)
        assert sum(np.prod(s) for s in source.values()) == sum(np.prod(s.shape) for s in target.values())
        if layout == "diffusers":
            assert source == expected and len(source) == tensors
        else:
            assert convert_flux2.config_from_bfl({f"model.diffusion_model.{n}": s for n, s in source.items()}) == config


def test_single_file_of_bfl_is_what_diffusers_makes_of_it():
    """diffusers' own conversion of a random file in BFL's names gives what our two tables read alike."""
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    config = Flux2Config(
        in_channels=12, out_channels=12, context_in_dim=20, hidden_size=256, num_heads=2, depth=2, depth_single_blocks=2,
        guidance_embed=True,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = engine.source_shapes(convert_flux2.table(config, "bfl"))
    bfl = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    assert convert_flux2.config_from_bfl({n: x.shape for n, x in bfl.items()}) == config
    ours = convert_flux2.params_from_torch({f"model.diffusion_model.{n}": x for n, x in bfl.items()}, config)
    theirs = convert_flux2_transformer_checkpoint_to_diffusers({n: torch.tensor(x) for n, x in bfl.items()})
    again = convert_flux2.params_from_torch({n: x.numpy() for n, x in theirs.items()}, config)
    jax.tree.map(np.testing.assert_array_equal, ours, again)


def test_every_kind_of_mismatch():
    config, _ = converted(torch_model())
    good = {n: p.numpy() for n, p in torch_model().state_dict().items()}
    name = "transformer_blocks.1.attn.to_q.weight"
    with pytest.raises(UserError, match=rf"1 missing: {name} \[48, 48\].*1 unexpected: surplus \[2\]"):
        convert_flux2.params_from_torch({n: p for n, p in good.items() if n != name} | {"surplus": np.zeros(2)}, config)
    with pytest.raises(UserError, match=f"{name} holds NaN"):
        convert_flux2.params_from_torch(good | {name: good[name] * np.nan}, config)
    with pytest.raises(UserError, match="no single_stream_modulation"):
        convert_flux2.params_from_torch({"img_in.weight": np.zeros(2)}, config)
    with pytest.raises(UserError, match="patch_size 2; expected 1"):
        convert_flux2.config_from_diffusers(dict(torch_model().config) | dict(patch_size=2))
    with pytest.raises(UserError, match="_class_name 'FluxTransformer2DModel'"):
        convert_flux2.config_from_diffusers(dict(_class_name="FluxTransformer2DModel"))


def test_guidance_that_does_not_fit_the_model():
    for config in (Flux2Config.tiny(), Flux2Config.tiny(guidance_embed=True)):
        x = inputs(config)
        x["guidance"] = None if config.guidance_embed else np.ones(2, np.float32)
        with pytest.raises(ValueError, match="guidance must be"):
            Flux2(config).init(jax.random.key(0), **x)


@pytest.mark.parametrize("change", [dict(num_heads=3), dict(axes_dim=(8, 8)), dict(depth=-1), dict(mlp_ratio=0.0)])
def test_sizes_that_do_not_fit(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Flux2Config.tiny(**change)
