"""What measures: DINO, DINOv2 and a whole CLIP against transformers' torch models, random weights, float32, through files and back.

Tolerance: 1e-4 of the largest value (what is seen is about 1e-6, the rounding of float32); a bicubic kernel of another constant is 1e-2 off.
"""

import json

import numpy as np
import pytest
import torch
import transformers

from dynaip_jax.errors import UserError
from dynaip_jax.images import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, centre_pixels
from dynaip_jax.measuring import networks
from dynaip_jax.measuring.networks import ClipMeasure, DinoMeasure
from dynaip_jax.models.dino import resizing
from dynaip_jax.testing import make_clip_tokenizer
from tests.parity.test_clip import randomised
from tools.convert_torch_weights.measures import main, read_measure

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=16)
RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (90, 130, 3), np.uint8), RNG.integers(0, 256, (130, 90, 3), np.uint8)]


def assert_close(ours, theirs, tolerance=1e-4):
    assert np.shape(ours) == np.shape(theirs)
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.abs(theirs).max()


def unit(x):
    return (x / x.norm(dim=-1, keepdim=True)).numpy()


def torch_pixels(pictures, resize, crop, mean, std):
    """As the processor of the checkpoints makes them."""
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor  # 5.x, 4.57
    sizes = dict(size=dict(shortest_edge=resize), crop_size=dict(height=crop, width=crop))
    processor = kind(**sizes, image_mean=mean.tolist(), image_std=std.tolist(), resample=3)
    return processor(pictures, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("kind", ["dino", "dinov2"])
def test_dino_is_torchs(kind, tmp_path, monkeypatch):
    if kind == "dino":
        model = transformers.ViTModel(transformers.ViTConfig(intermediate_size=64, **SIZES), add_pooling_layer=False)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(mlp_ratio=2, **SIZES))
    randomised(model).save_pretrained(tmp_path / "torch")
    assert main(["--source", str(tmp_path / "torch"), "--out", str(tmp_path / "measure")]) == 0
    for crop in (64, 96):  # as positions were learned, and interpolated
        monkeypatch.setattr(networks, "DINO_CROP", crop)
        measure = DinoMeasure(tmp_path / "measure")
        pixels = torch_pixels(PICTURES, 256, crop, IMAGENET_MEAN, IMAGENET_STD)
        with torch.no_grad():
            options = dict(interpolate_pos_encoding=True) if kind == "dino" else {}
            states = model(pixels, **options).last_hidden_state
        assert_close(measure.images(PICTURES), unit(states[:, 0]))
        whole = [p[:90, :90] for p in PICTURES]
        with torch.no_grad():
            pixels = torch_pixels(whole[:1], crop, crop, IMAGENET_MEAN, IMAGENET_STD)
            states = model(pixels, **options).last_hidden_state
        assert_close(measure.patches(whole[0]), unit(states[:, 1:]).reshape(crop // 16, crop // 16, 32))
    assert measure.name == f"DINO{'v2' if kind == 'dinov2' else ''} ViT-32/16"


def test_clip_is_torchs(tmp_path):
    folder = make_clip_tokenizer(tmp_path / "torch")
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    text = dict(sizes, vocab_size=300, max_position_embeddings=77, eos_token_id=1, bos_token_id=2)
    vision = dict(sizes, hidden_size=48, image_size=32, patch_size=8)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    model = randomised(transformers.CLIPModel(config))
    model.save_pretrained(folder)
    assert main(["--source", str(folder), "--out", str(tmp_path / "measure")]) == 0
    measure, tokenizer = ClipMeasure(tmp_path / "measure"), transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["a cup", "a red cup on a table " * 20]
    ids = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        pixels = torch_pixels(PICTURES, 32, 32, CLIP_MEAN, CLIP_STD)
        images = _features(model.get_image_features(pixel_values=pixels))
        words = _features(model.get_text_features(input_ids=ids))
    assert_close(measure.images(PICTURES), unit(images))
    assert_close(measure.texts(texts), unit(words))
    assert measure.name == "CLIP ViT-48/8@32"
    with pytest.raises(UserError, match="unknown family 'clip'"):
        DinoMeasure(tmp_path / "measure")


def _features(made):
    return made if isinstance(made, torch.Tensor) else made.pooler_output


def test_pixels_are_those_of_the_processors():
    for picture in PICTURES:
        ours = centre_pixels(picture, 64, 56, CLIP_MEAN, CLIP_STD)
        theirs = torch_pixels([picture], 64, 56, CLIP_MEAN, CLIP_STD)[0].numpy().transpose(1, 2, 0)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_resizing_is_torchs():
    for source, target in ((37, 16), (14, 28), (4, 6)):
        eye = torch.eye(source)[None, None]
        theirs = torch.nn.functional.interpolate(eye, size=(target, source), mode="bicubic", align_corners=False)[0, 0]
        np.testing.assert_allclose(resizing(source, target), theirs.numpy(), atol=1e-5)


def test_other_models_are_refused(tmp_path):
    for config, message in (
        (dict(model_type="siglip"), "of a 'siglip'; expected one of clip, vit, dinov2"),
        (dict(model_type="dinov2", use_swiglu_ffn=True), "use_swiglu_ffn True: expected False"),
        (dict(model_type="vit", hidden_size=33, num_attention_heads=4), "hidden_size 33 is not a multiple"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        from safetensors.numpy import save_file

        save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=message):
            read_measure(tmp_path)
