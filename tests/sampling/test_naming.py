"""Names of pictures, as they are and from templates."""

import time

import pytest

from dynaip_jax.errors import UserError
from dynaip_jax.sampling.naming import outputs

NOW = time.struct_time((2026, 11, 26, 18, 5, 9, 3, 330, 0))
CAT, DOG = "A cat, on ice!", "a dog"


@pytest.mark.parametrize(
    ("output", "prompts", "each", "seed", "expected"),
    (
        ("o.png", [CAT], 1, 0, ["o.png"]),
        ("o.png", [CAT], 2, 0, ["o.png", "o_0.png", "o_1.png"]),
        ("o.png", [CAT, DOG], 1, None, ["o.png", "o_0.png", "o_1.png"]),
        ("a{1}.png", [CAT], 1, 0, ["a{1}.png"]),
        ("{date}/{time}_{prompt}_{seed}_{n}.png", [CAT], 1, 7, ["2026-11-26/180509_A_cat_on_ice_7_0.png"]),
        ("{seed}.png", [CAT], 2, 7, ["7-8.png", "7.png", "8.png"]),
        ("{n}.png", [CAT], 2, None, ["grid.png", "0.png", "1.png"]),
        ("{prompt}.png", [CAT, DOG], 1, 7, ["2_prompts.png", "A_cat_on_ice.png", "a_dog.png"]),
        ("{prompt}.png", [CAT], 2, 7, ["A_cat_on_ice.png", "A_cat_on_ice_0.png", "A_cat_on_ice_1.png"]),
        ("{seed}.png", [CAT, DOG], 1, 7, ["7.png", "7_0.png", "7_1.png"]),
        ("{prompt}_{seed}.png", [CAT, DOG], 2, 7, ["2_prompts_7-8.png", "A_cat_on_ice_7.png", "A_cat_on_ice_8.png", "a_dog_7.png", "a_dog_8.png"]),
        ("{seed}.png", [CAT], 1, None, ["noise.png"]),
        ("{prompt}.png", ["/../" * 9], 1, 0, ["prompt.png"]),
        ("{prompt}.png", ["x" * 300], 1, 0, ["x" * 40 + ".png"]),
    ),
)  # fmt: skip
def test_names(output, prompts, each, seed, expected):
    found = outputs(output, prompts, each, seed, NOW)
    assert found == expected


def test_a_field_that_there_is_not():
    with pytest.raises(
        UserError, match=r"`output` \{sed\}.png: \{sed\} is no field; expected some of \{prompt\}, \{seed\}"
    ):
        outputs("{sed}.png", [CAT], 1, 0, NOW)
