"""What an image prompt may and may not change in the transformer, of every family."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynaip_jax.choices import MERGES, QUERIES
from dynaip_jax.layers import injection, regions
from dynaip_jax.layers.compute import Compute
from dynaip_jax.layers.injection import BlockPrompt, Injection, Places
from dynaip_jax.layers.positions import apply_rope, rope_table
from dynaip_jax.layers.regions import RegionScores
from dynaip_jax.models import flux2
from dynaip_jax.models.flux import FluxConfig
from dynaip_jax.types import KV, ImagePrompt, References
from tests.models.backbones import BACKBONES, PLAIN, B, I, M, S, T, normal

CONFIG = FluxConfig.tiny()  # the sizes of all
GRID = np.stack(np.meshgrid([0], range(4), range(4), indexing="ij"), -1).reshape(1, I, 3).astype(np.float32)


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request):
    return BACKBONES[request.param]


def kv(depth, batch=B, subjects=S, seed=0):
    shape = (depth, batch, subjects, M, CONFIG.num_heads, CONFIG.head_dim)
    return KV(normal(seed, *shape), normal(seed + 1, *shape))


def image_prompt(image_gain=1.0, text_gain=0.0, blocks="all", batch=B, **changes):
    injected = CONFIG.depth + (CONFIG.depth_single_blocks if blocks == "all" else 0)
    return ImagePrompt(
        double=kv(CONFIG.depth, batch),
        single=kv(CONFIG.depth_single_blocks, batch, seed=7) if blocks == "all" else None,
        image_gain=jnp.full((injected, batch, S), image_gain),
        text_gain=jnp.full((injected, batch, S), text_gain),
        region=None,
    )._replace(**changes)


class Model(NamedTuple):
    """Called with an image prompt: its output for the same inputs."""

    network: Any
    config: Any
    params: Any
    inputs: dict[str, Any]
    forward: Any

    def __call__(self, prompt=None, **changes):
        return np.asarray(self.forward(self.params, **(self.inputs | changes), image_prompt=prompt))

    def computed(self, *how):
        """Its output, computed otherwise, by image prompt."""
        network = self.network(self.config, *how)
        return lambda p: network.apply(self.params, **self.inputs, image_prompt=p)


@pytest.fixture(scope="module")
def model(backbone):
    inputs = backbone.inputs() | dict(timesteps=jnp.array([0.3, 0.8]))
    network = backbone.network(backbone.config)
    params = jax.jit(network.init)(jax.random.key(0), **inputs)
    return Model(backbone.network, backbone.config, params, inputs, jax.jit(network.apply))


@pytest.mark.parametrize("blocks", ["double", "all"])
def test_no_gain_and_no_value_leave_the_base_bit_for_bit(model, blocks):
    base = model()
    np.testing.assert_array_equal(model(image_prompt(0.0, blocks=blocks)), base)
    fresh = image_prompt(1.0, 1.0, blocks)
    fresh = fresh._replace(double=fresh.double._replace(v=0 * fresh.double.v))
    if fresh.single is not None:
        fresh = fresh._replace(single=fresh.single._replace(v=0 * fresh.single.v))
    np.testing.assert_array_equal(model(fresh), base)
    assert np.abs(model(image_prompt(1.0, blocks=blocks)) - base).max() > 1e-3


def test_parameters_are_the_same_with_and_without_a_prompt(backbone):
    spec, init = backbone.network.inputs_spec(backbone.config, B, I, T), backbone.network(backbone.config).init
    without = jax.eval_shape(init, jax.random.key(0), **spec)
    assert without == jax.eval_shape(lambda k, x: init(k, **x, image_prompt=image_prompt()), jax.random.key(0), spec)


def test_every_parameter_has_logical_axes(backbone):
    spec, init = backbone.network.inputs_spec(backbone.config), backbone.network(backbone.config).init
    tree = jax.eval_shape(init, jax.random.key(0), **spec)["params"]
    for leaf in jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "names")):
        assert len(leaf.names) == leaf.value.ndim


def block_run(backbone, kind, how, rows, prompt):
    """Image rows and text rows after one block."""
    (txt, img), block = rows, backbone.block(kind, how)
    state = (img, txt, None) if kind == "double" else (jnp.concatenate([txt, img], axis=1), None)
    rope = rope_table(normal(2, 1, T + I, backbone.axes), backbone.config.axes_dim, 10_000)
    shared = backbone.shared(rope, Places(None))
    params = block.init(jax.random.key(0), state, shared, None)
    out = jax.jit(lambda p: block.apply(params, state, shared, p)[0])(prompt)
    return out[:2] if kind == "double" else (out[0][:, T:], out[0][:, :T])


@pytest.mark.parametrize("branch", ["image", "text"])
@pytest.mark.parametrize("kind", ["double", "single"])
def test_each_gain_reaches_its_own_branch_only(backbone, kind, branch):
    rows = normal(3, B, T, CONFIG.hidden_size), normal(4, B, I, CONFIG.hidden_size)

    def run(p):
        image, text = block_run(backbone, kind, PLAIN, rows, p)
        return dict(image=image, text=text)

    bank = KV(*(x[0] for x in kv(1)))
    gains = dict(image_gain=jnp.zeros((B, S)), text_gain=jnp.zeros((B, S)))
    off = run(BlockPrompt(bank, **gains))
    on = run(BlockPrompt(bank, **gains | {f"{branch}_gain": jnp.ones((B, S))}))
    other = {"image": "text", "text": "image"}[branch]
    np.testing.assert_array_equal(on[other], off[other])
    assert np.abs(on[branch] - off[branch]).max() > 1e-3


def naive_reference_term(q, bank, gain, merge="sum"):
    q, (k, v), gain = np.asarray(q), map(np.asarray, bank), np.asarray(gain)
    out = np.zeros(q.shape)
    for b, h in np.ndindex(B, CONFIG.num_heads):
        w = [np.exp(q[b, :, h] @ k[b, s, :, h].T / np.sqrt(CONFIG.head_dim)) for s in range(S)]
        total = [x.sum(-1, keepdims=True) for x in w]
        for s in range(S):
            over = sum(total) if merge == "concat" else total[s]
            out[b, :, h] += gain[b, :, s, None] * (w[s] / over) @ v[b, s, :, h]
    return out


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("query", QUERIES)
def test_injected_term_is_the_equation(backbone, query, merge):
    how = Injection(query=query, merge=merge)
    q, k, v = (normal(i, B, T + I, CONFIG.num_heads, CONFIG.head_dim) for i in range(3))
    rope = rope_table(normal(2, 1, T + I, 3), CONFIG.axes_dim, 10_000)
    bank = KV(*(x[0] for x in kv(1)))
    region = jax.random.uniform(jax.random.key(9), (B, S, I))
    prompt = BlockPrompt(bank, jnp.array([[1.0, 0.5], [2.0, 0.0]]), jnp.array([[0.0, 0.3], [0.1, 0.0]]))
    shared = backbone.shared(rope, Places(region))
    on, off = (backbone.attend(how, (q, k, v), shared, p, None)[0] for p in (prompt, None))
    term = on - off
    gain = np.concatenate(
        [
            np.repeat(prompt.text_gain[:, None], T, 1),
            np.asarray(prompt.image_gain)[:, None] * np.moveaxis(region, 1, 2),
        ],
        axis=1,
    )
    used = apply_rope(q, rope) if query == "after_rope" else q
    np.testing.assert_allclose(term, naive_reference_term(used, bank, gain, merge), atol=2e-5)


@pytest.mark.parametrize("kind", ["double", "single"])
def test_residual_site_adds_the_ungated_heads_after_the_block(backbone, kind):
    """XLabs' place: a hand-made bank whose keys are alike gives every row the mean of its values, past projection, gate and MLP."""
    rows = normal(3, B, T, CONFIG.hidden_size), normal(4, B, I, CONFIG.hidden_size)
    values = normal(5, B, 1, M, CONFIG.num_heads, CONFIG.head_dim)
    prompt = BlockPrompt(KV(jnp.zeros_like(values), values), jnp.full((B, 1), 0.7), jnp.zeros((B, 1)))
    how = Injection(site="residual")
    run = lambda p: block_run(backbone, kind, how, rows, p)
    (image, text), (image_off, text_off) = run(prompt), run(None)
    added = 0.7 * np.mean(values, axis=2).reshape(B, 1, CONFIG.hidden_size)
    np.testing.assert_allclose(image - image_off, np.broadcast_to(added, image.shape), atol=1e-5)
    np.testing.assert_array_equal(text, text_off)


def test_residual_site_through_the_whole_transformer(model):
    """Through the whole transformer: it acts, otherwise than before the projection, and without gain not at all."""
    run = model.computed(Compute(), Injection(site="residual"))
    np.testing.assert_array_equal(run(image_prompt(0.0)), run(None))
    acting = run(image_prompt(1.0))
    assert np.abs(acting - model()).max() > 1e-3 and np.abs(acting - model(image_prompt(1.0))).max() > 1e-3


def test_full_size_forward_with_an_image_prompt(backbone):
    """Shapes of a published model at 1024 pixels with a bank for all blocks; nothing is allocated."""
    config, shape = backbone.dev, jax.ShapeDtypeStruct
    network = backbone.network(config)
    spec = network.inputs_spec(config, batch=1, image_rows=4096, text_rows=512)
    kv = lambda depth: KV(*[shape((depth, 1, 1, 257, config.num_heads, 128), jnp.bfloat16)] * 2)
    gain = shape((config.depth + config.depth_single_blocks, 1, 1), jnp.float32)
    prompt = ImagePrompt(kv(config.depth), kv(config.depth_single_blocks), gain, gain, None)
    params = jax.eval_shape(network.init, jax.random.key(0), **spec)
    out = jax.eval_shape(lambda v, p, x: network.apply(v, **x, image_prompt=p), params, prompt, spec)
    assert out.shape == (1, 4096, config.out_channels) and out.dtype == jnp.float32


def test_one_subject_is_the_same_summed_or_concatenated():
    q, bank = normal(0, B, I, CONFIG.num_heads, CONFIG.head_dim), KV(*(x[0] for x in kv(1)))
    gain = injection.row_gain(jnp.full((B, S), 0.7), None, B, I)
    one = KV(bank.k[:, :1], bank.v[:, :1])
    total, joint = (np.asarray(injection.reference_attention(q, one, gain[..., :1], merge)) for merge in MERGES)
    np.testing.assert_allclose(joint, total, atol=1e-6)
    total, joint = (np.asarray(injection.reference_attention(q, bank, gain, merge)) for merge in MERGES)
    assert np.abs(joint - total).max() > 1e-2


def test_choices_of_the_reference_term_are_checked():
    for cls, field in ((Injection, "query"), (Injection, "merge"), (Injection, "site"), (Compute, "attention")):
        with pytest.raises(ValueError, match=f"{field} 'other': expected one of"):
            cls(**{field: "other"})


def test_disjoint_regions_leave_each_others_rows_untouched():
    q = normal(0, B, I, CONFIG.num_heads, CONFIG.head_dim)
    region = jnp.zeros((B, S, I)).at[:, 0, : I // 2].set(1).at[:, 1, I // 2 :].set(1)
    gain = injection.row_gain(jnp.ones((B, S)), region, B, I)
    bank = KV(*(x[0] for x in kv(1)))
    swapped = KV(*(x.at[:, 1].set(normal(8, *x[:, 1].shape)) for x in bank))
    before, after = (np.asarray(injection.reference_attention(q, b, gain)) for b in (bank, swapped))
    np.testing.assert_array_equal(after[:, : I // 2], before[:, : I // 2])
    assert np.abs(after[:, I // 2 :] - before[:, I // 2 :]).min(axis=-1).max() > 1e-3
    alone = injection.reference_attention(q, KV(bank.k[:, :1], bank.v[:, :1]), gain[..., :1])
    np.testing.assert_allclose(before[:, : I // 2], alone[:, : I // 2], atol=1e-6)


def test_a_prompt_of_batch_one_serves_the_whole_batch(model):
    one = image_prompt(1.0, 0.5, batch=1)
    two = jax.tree.map(lambda x: jnp.repeat(x, B, axis=1), one._replace(region=None))
    np.testing.assert_allclose(model(one), model(two), atol=1e-6)


def test_a_prompt_for_another_base_is_refused(model):
    good = image_prompt()
    with pytest.raises(ValueError, match="made for another base"):
        model(good._replace(double=KV(good.double.k[:1], good.double.v[:1])))
    with pytest.raises(ValueError, match="gains for 3 blocks, expected 4"):
        model(good._replace(image_gain=good.image_gain[:3], text_gain=good.text_gain[:3]))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_reach_the_bank_through_scan_and_remat(model, remat):
    prompt, run = image_prompt(text_gain=1.0), model.computed(Compute(remat=remat))
    grads = jax.jit(jax.grad(lambda p: jnp.sum(run(p) ** 2)))(prompt)
    for g in jax.tree.leaves((grads.double, grads.single)):
        assert bool(jnp.isfinite(g).all())
        assert float(jnp.abs(g).reshape(len(g), -1).max(axis=1).min()) > 0  # in every block


def words(*rows):
    """`[1, s, T]`: subject s has text row `rows[s]` to itself."""
    return jax.nn.one_hot(jnp.array(rows), T)[None]


def test_auto_region_is_its_definition():
    q, k = (normal(i, B, n, CONFIG.num_heads, CONFIG.head_dim) for i, n in enumerate((I, T)))
    own = jax.nn.softmax(normal(2, 1, S, T), axis=-1)
    smoothing = regions.smoothing_matrix(jnp.asarray(GRID), sigma=0.8)
    found = regions.auto_region(regions.word_scores(q, k, own, smoothing), 1.5)

    grid = [(r, c) for r in range(4) for c in range(4)]
    near = np.array([[np.exp(-((a - x) ** 2 + (b - y) ** 2) / (2 * 0.8**2)) for x, y in grid] for a, b in grid])
    near /= near.sum(axis=1, keepdims=True)
    expected = np.zeros((B, S, I))
    for b in range(B):
        score = np.zeros((I, S))
        for h in range(CONFIG.num_heads):
            w = np.exp(np.asarray(q)[b, :, h] @ np.asarray(k)[b, :, h].T / np.sqrt(CONFIG.head_dim))
            score += w / w.sum(axis=1, keepdims=True) @ np.asarray(own)[0].T / CONFIG.num_heads
        power = (near @ score).T ** 1.5
        expected[b] = power / power.sum(axis=0)
    np.testing.assert_allclose(smoothing[0], near, atol=1e-6)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_auto_region_follows_the_words():
    """Left image columns attend to text row 2, right ones to row 5."""
    left = (jnp.arange(I) % 4 < 2)[:, None]
    a, b = jnp.eye(CONFIG.head_dim)[:2] * 12
    q = jnp.broadcast_to(jnp.where(left, a, b)[None, :, None], (B, I, CONFIG.num_heads, CONFIG.head_dim))
    k = jnp.zeros((B, T, CONFIG.num_heads, CONFIG.head_dim)).at[:, 2].set(a).at[:, 5].set(b)
    smoothing = regions.smoothing_matrix(jnp.asarray(GRID))

    def share(own):
        return np.asarray(regions.auto_region(regions.word_scores(q, k, own, smoothing), 2.0))[0].reshape(-1, 4, 4)

    first, second = share(words(2, 5))
    np.testing.assert_allclose(first + second, 1, atol=1e-6)
    assert first[:, :2].min() > 0.7 and second[:, 2:].min() > 0.7
    assert (first[:, 0] > first[:, 1]).all()  # smoothed: surer away from the border
    np.testing.assert_allclose(share(words(5, 2)), np.stack([second, first]), atol=1e-6)
    np.testing.assert_allclose(share(words(2, 2)), 0.5, atol=1e-6)
    np.testing.assert_array_equal(share(words(2)), 1)
    no_words = 0 * words(2, 5)  # scores of 0: shared evenly, not NaN
    np.testing.assert_allclose(share(no_words), 0.5, atol=1e-6)


@pytest.mark.parametrize("kind", ["double", "single"])
def test_blocks_find_the_regions_from_their_own_queries_and_keys(model, kind, monkeypatch):
    """Words move what those blocks draw, each subject's its own; and the regions are used as given ones are."""
    prompt, own = image_prompt(), words(1, 6)
    other = slice(CONFIG.depth) if kind == "single" else slice(CONFIG.depth, None)
    silent = prompt._replace(image_gain=prompt.image_gain.at[other].set(0))
    found, plain = model(silent._replace(words=own)), model(silent)
    assert np.abs(found - plain).max() > 1e-3
    np.testing.assert_allclose(found, model(silent._replace(words=jnp.repeat(own, B, axis=0))), atol=1e-6)
    assert np.abs(found - model(silent._replace(words=own[:, ::-1]))).max() > 1e-3
    monkeypatch.setattr(regions, "auto_region", lambda scores, _: jnp.ones((B, S, I)) / 4)
    given = silent._replace(region=jnp.ones((1, S, I)) / 4)
    run = model.computed()
    np.testing.assert_allclose(run(silent._replace(words=own)), run(given), atol=1e-6)


def test_a_block_reads_image_queries_and_text_keys_after_rope_and_adds_to_what_is_found(backbone):
    q, k, v = (normal(i, B, T + I, CONFIG.num_heads, CONFIG.head_dim) for i in range(3))
    rope, bank = rope_table(normal(2, 1, T + I, 3), CONFIG.axes_dim, 10_000), KV(*(x[0] for x in kv(1)))
    prompt, smoothing = BlockPrompt(bank, jnp.ones((B, S)), jnp.ones((B, S))), regions.smoothing_matrix(GRID)
    how, own = Injection(sharpness=3.0), words(1, 6)
    before = RegionScores(normal(5, B, S, I), jnp.float32(2))
    shared = backbone.shared(rope, Places(None, own, smoothing))
    found, _, after = backbone.attend(how, (q, k, v), shared, prompt, before)
    rotated, keys = (apply_rope(x, rope) for x in (q, k))
    scores = before.scores + regions.word_scores(rotated[:, T:], keys[:, :T], own, smoothing)
    np.testing.assert_allclose(after.scores, scores, atol=1e-6)
    assert float(after.blocks) == 3
    region = regions.auto_region(scores / 3, 3.0)
    shared = backbone.shared(rope, Places(region))
    given, _, _ = backbone.attend(how, (q, k, v), shared, prompt, None)
    np.testing.assert_allclose(found, given, atol=1e-6)


def test_regions_are_of_all_blocks_so_far(model, monkeypatch):
    """Each block adds what it sees; blocks of both kinds count on."""
    seen, real = [], regions.auto_region

    def watched(scores, sharpness):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), scores, ordered=True)
        return real(scores, sharpness)

    monkeypatch.setattr(regions, "auto_region", watched)
    own, each = words(1, 6), []
    score = regions.word_scores

    def noted(*args):
        x = score(*args)
        jax.debug.callback(lambda x: each.append(np.asarray(x)), x, ordered=True)
        return x

    monkeypatch.setattr(regions, "word_scores", noted)
    jax.block_until_ready(model.computed()(image_prompt(words=own)))
    jax.effects_barrier()
    assert len(seen) == len(each) == CONFIG.depth + CONFIG.depth_single_blocks
    means = np.cumsum(each, axis=0) / np.arange(1, len(each) + 1)[:, None, None, None]
    np.testing.assert_allclose(seen, means, atol=1e-5)


def test_words_cost_nothing_where_there_are_none_or_one_subject(model, monkeypatch):
    def refuse(*_):
        raise AssertionError("a region was computed")

    monkeypatch.setattr(regions, "auto_region", refuse)
    monkeypatch.setattr(regions, "smoothing_matrix", refuse)
    one = jax.tree.map(lambda x: x[:, :, :1], image_prompt())
    run = model.computed()
    np.testing.assert_array_equal(run(one._replace(words=words(3))), run(one))
    run(image_prompt())
    with pytest.raises(AssertionError, match="was computed"):
        run(image_prompt(words=words(3, 4)))


def test_auto_regions_under_remat_are_the_same(model):
    prompt, run = image_prompt(words=words(1, 6)), model.computed(Compute(remat="full"))
    value, grads = jax.jit(jax.value_and_grad(lambda p: jnp.sum(run(p) ** 2)))(prompt)
    np.testing.assert_allclose(value, np.sum(model(prompt) ** 2), rtol=1e-5)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_words_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match="both regions and words"):
        model(image_prompt(words=words(1, 6), region=jnp.ones((1, S, I)) / 2))
    with pytest.raises(ValueError, match=r"words for subjects, text rows \(1, 8\); expected \(2, 8\)"):
        model(image_prompt(words=words(1)))
    with pytest.raises(ValueError, match=r"\(2, 5\); expected \(2, 8\)"):
        model(image_prompt(words=words(1, 2)[..., :5]))


def test_the_models_own_references_are_read_and_not_injected_into():
    """FLUX.2's rows of reference pictures: they change the picture, alone and with the bank, whose shares of regions stay of image rows;
    and the bank acts on text and image rows, whatever the values in reference rows."""
    backbone = BACKBONES["flux2"]
    inputs, network = backbone.inputs(), backbone.network(backbone.config)
    params = jax.jit(network.init)(jax.random.key(0), **inputs)
    ids = jnp.asarray(GRID[:, :6])
    references = References(
        normal(5, 1, 6, 128).repeat(B, 0), jnp.concatenate([ids + jnp.array([10, 0, 0]), 0 * ids[..., :1]], -1)
    )
    run = jax.jit(lambda p, r: network.apply(params, **inputs, image_prompt=p, references=r))
    read = run(None, references)
    assert read.shape == (B, I, 128) and np.abs(read - run(None, None)).max() > 1e-3
    np.testing.assert_array_equal(run(image_prompt(0.0, words=words(1, 6)), references), read)
    assert np.abs(run(image_prompt(words=words(1, 6)), references) - read).max() > 1e-3

    q, k, v = (normal(i, B, T + I + 6, CONFIG.num_heads, CONFIG.head_dim) for i in range(3))
    counts = flux2.Counts(T, I)
    rope, bank = rope_table(normal(2, 1, T + I + 6, 4), backbone.config.axes_dim, 2000), KV(*(x[0] for x in kv(1)))
    prompt = BlockPrompt(bank, jnp.ones((B, S)), jnp.ones((B, S)))
    on, term, _ = backbone.attend(PLAIN, (q, k, v), backbone.shared(rope, Places(None)), prompt, None, sum(counts))
    off, _, _ = backbone.attend(PLAIN, (q, k, v), backbone.shared(rope, Places(None)), None, None, sum(counts))
    np.testing.assert_array_equal(on[:, T + I :], off[:, T + I :])
    assert np.abs(np.asarray(on - off)[:, : T + I]).max(axis=(-1, -2)).min() > 1e-3 and not term[:, T + I :].any()
