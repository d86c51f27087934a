"""The library runs with transformers 5 and with 4.57, and draws the same picture with both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel

from dynaip_jax.families.tokenizers import Tokenizers

OLD = Path(sys.prefix) / "transformers-4"


def python_with_old_transformers(code, *args):
    assert OLD.is_dir(), f"{OLD} is missing: `make test` installs transformers 4.57 there"
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(OLD), str(Path(__file__).parents[2])]))
    result = subprocess.run([sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_same_picture_with_both(dynaip, tiny, photograph, tmp_path):
    def command(out):
        return [
            "sample", "--model", tiny[0], "--adapter", tiny[1], "--reference", photograph, "--prompt", "a cup", "--steps", 2,
            "--height", 32, "--width", 32, "--output", tmp_path / out,
        ]  # fmt: skip

    assert dynaip(*command("new.png"))[0] == 0
    code = "import sys, transformers; from dynaip_jax.app import main; print(transformers.__version__); main.run(sys.argv[1:])"
    assert python_with_old_transformers(code, *command("old.png")).startswith("4.57")
    new, old = (np.asarray(Image.open(tmp_path / f"{n}.png")) for n in ("new", "old"))
    np.testing.assert_array_equal(new, old)


def test_tokenizers_in_the_form_of_the_published_folders(tmp_path):
    """FLUX.1's CLIP tokenizer is vocab.json + merges.txt without tokenizer.json; both versions read it alike."""
    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(a + "</w>" for a in alphabet), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    clip = tmp_path / "clip"
    clip.mkdir()
    (clip / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(words)}))
    (clip / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    config = dict(tokenizer_class="CLIPTokenizer", model_max_length=77, pad_token="<|endoftext|>")
    (clip / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "t5").symlink_to(clip)
    texts = ["a cat", ""]
    ids = Tokenizers.load(tmp_path, 12, 9).clip(texts)
    assert ids.shape == (2, 9) and words[ids[0, 2]] == "cat</w>" and words[ids[1, 1]] == "<|endoftext|>"
    code = (
        "import sys; from pathlib import Path; from dynaip_jax.families.tokenizers import Tokenizers;"
        "print(Tokenizers.load(Path(sys.argv[1]), 12, 9).clip(sys.argv[2:]).tolist())"
    )
    assert json.loads(python_with_old_transformers(code, tmp_path, *texts)) == ids.tolist()
