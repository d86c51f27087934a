"""Every member of the zoo of public layouts: the golden, or a refusal by name."""

import re
from importlib.util import find_spec

import pytest

from dynaip_jax.errors import UserError
from tests.tools import zoo

pytestmark = [
    pytest.mark.skipif(not zoo.MAKER.is_file(), reason="the zoo's generator is not there"),
    pytest.mark.skipif(find_spec("torchao") is None, reason="the zoo's generator needs torchao"),
]
EITHER = {  # accepted, though the zoo would have them refused: its notes say that this is better, or as good
    "quanto-folder", "t5-bnb-int8", "clip-l-longclip", "folder-without-t5", "config-with-other-rope",
    "clip-vision-wrong-encoder",  # SigLIP is known for what it is, and becomes that component
}  # fmt: skip
REFUSED = {  # though the zoo would have them accepted: what the refusal says
    "clip-vision-openai-pt": "TorchScript archive, which would have to be run",
}
ADAPTERS = {  # image-prompt adapters: what a refusal says, None for those that give the golden
    "ipa-instantx-bin": None, "ipa-instantx-safetensors": None, "ipa-xlabs-v1": None, "ipa-xlabs-v2": None, "ipa-pulid": "a PuLID adapter",
    "ipa-sd15": "an image-prompt adapter of another backbone", "ipa-xlabs-missing-block": "made for 1 dual-stream blocks",
    "malicious-pickle-adapter": "could run code and is not read",
}  # fmt: skip
NAMED = {  # what a refusal says of a file
    "torchao-folder": "torchao", "nunchaku-svdq": "nunchaku", "chroma": "this is Chroma", "flux2": "FLUX.2", "sdxl-checkpoint": "an SDXL checkpoint",
    "sd3-checkpoint": "Stable Diffusion 3", "flux-controlnet": "a ControlNet", "flux-redux": "FLUX.1 Redux", "vae-taef1": "TAEF1",
    "vae-sdxl": "Stable Diffusion or SDXL", "lfs-pointer": "git-LFS pointer of 13. bytes", "html-page": "a web page", "json-error": "a message of a site .*Unauthorized",
    "empty-file": "is empty", "truncated": "not a whole safetensors", "zeros-at-the-end": "its last .* bytes and more are zeros",
    "nan-weight": "single_blocks.1.linear2.weight holds NaN", "one-wrong-shape": r"1 wrong shape: double_blocks.1.img_mlp.2.bias", "mixture-of-layouts": "unexpected",
    "missing-shard": "no such file", "one-shard-twice": "not in it|is in it", "index-and-stale-whole-file": "expected one set of weights",
    "index-points-outside": "weight_map names", "index-lies": "is not in it|is in it", "malicious-pickle": "could run code and is not read",
    "header-overlap": "not a whole safetensors", "header-giant": "not a whole safetensors", "zip-file": "no whole file of weights",
    "text-encoder-as-vision": "clip_text_model",
}  # fmt: skip


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    return folder, zoo.make(folder)


def test_every_member_gives_the_golden_or_a_refusal_by_name(members):
    root, every = members
    verdicts = {
        name: verdict(root, member) for name, member in every.items() if member["kind"] in ("source", "clip_vision")
    }
    wrong = [f"{name}: {text}" for name, (kind, text) in verdicts.items() if kind == "wrong"]
    assert not wrong, "\n".join(wrong)
    assert sum(kind == "golden" for kind, _ in verdicts.values()) > 75
    assert not list(root.rglob("PWNED"))


def verdict(root, member):
    """("golden" or "refused" or "wrong", what is to be said of a member)."""
    name, accepted = member["name"], member["wants"] == "accept"
    try:
        parts = zoo.read_in(member["kind"], root / member["source"])
    except UserError as e:
        expected = REFUSED.get(name) if accepted else NAMED.get(name)
        return "refused" if expected and re.search(expected, str(e)) else "wrong", str(e)
    except Exception as e:
        return "wrong", f"{type(e).__name__}: {e}"
    if not accepted and name not in EITHER:
        return "wrong", "accepted"
    goldens = {part: root / file for part, file in member["goldens"].items()}
    if missing := goldens.keys() - parts.keys():
        return "wrong", f"lacks {missing}"
    far = {part: zoo.distance(part, *parts[part], file) for part, file in goldens.items()}
    return "wrong" if max(far.values(), default=0) > member["tolerance"] else "golden", str(far)


def test_every_adapter_gives_the_golden_or_a_refusal_by_name(members):
    root, every = members
    found = [m for m in every.values() if m["kind"] == "adapter"]
    assert {m["name"] for m in found} == set(ADAPTERS)
    transformer = zoo.read_in("source", root / every["ipa-xlabs-v1"]["with_sources"][0])["transformer"]
    for member in found:
        if said := ADAPTERS[member["name"]]:
            with pytest.raises(UserError, match=said):
                zoo.adapter_distance(root / member["source"], *transformer, None)
            continue
        far = zoo.adapter_distance(root / member["source"], *transformer, root / member["goldens"]["transformer"])
        assert far <= member["tolerance"], f"{member['name']}: {far}"
