"""Stages of Shapeland's training, with `--go-on`."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dynaip_jax.errors import UserError
from dynaip_jax.families.registry import open_bundle
from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.shapeland import default
from dynaip_jax.storage.manifest import flatten
from train.shapeland.__main__ import main
from train.shapeland.configs import FAMILY
from train.shapeland.workdir import DONE, WEIGHTS


def test_going_on_starts_from_the_package_with_another_t5(tmp_path):
    fresh = FAMILY.init_params("t5", jax.random.key(7))
    (tmp_path / "text").mkdir()
    save_file({k: np.asarray(v) for k, v in flatten(fresh).items()}, tmp_path / "text" / WEIGHTS)
    main(["--workdir", str(tmp_path), "--go-on", "--stages", "encoders"])
    assert json.loads((tmp_path / "encoders" / DONE).read_text())["seconds"] >= 0
    own = open_bundle(default.paths()[0])
    pipe = DynaIPPipeline.load(tmp_path / "encoders" / "bundle")
    assert pipe.bundle.fingerprint == own.fingerprint
    for name, x in flatten(pipe.params["t5"]).items():
        np.testing.assert_allclose(x, flatten(fresh)[name], rtol=2**-8, err_msg=name)  # bfloat16
    with pytest.raises(UserError, match="--stages vae: is kept with --go-on"):
        main(["--workdir", str(tmp_path), "--go-on", "--stages", "vae"])
