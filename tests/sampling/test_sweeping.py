"""Options that vary: how they are said, and what is refused."""

import pytest

from dynaip_jax.errors import UserError
from dynaip_jax.sampling.options import SampleOptions
from dynaip_jax.sampling.sweeping import SWEPT, Axis, grid, read_axis


@pytest.mark.parametrize(
    "text, option, values",
    [
        ("image_scale=0.2,0.6,1", "image_scale", (0.2, 0.6, 1.0)),
        ("image-scale=0.5:1,1", "image_scale", ((0.5, 1.0), 1.0)),
        ("granularity=default,1:0:0", "granularity", (None, (1.0, 0.0, 0.0))),
        ("steps=4, 8", "steps", (4, 8)),
        ("regions=auto,none", "regions", ("auto", "none")),
        ("fit=default,crop", "fit", ("pad", "crop")),
        ("negative_prompt=a cat,rain", "negative_prompt", ("a cat", "rain")),
    ],
)
def test_an_axis_is_what_it_says(text, option, values):
    axis = read_axis(text, "x")
    assert (axis.option, axis.values) == (option, values)
    assert all(type(a) is type(b) for a, b in zip(axis.values, values, strict=True))


@pytest.mark.parametrize(
    "text, found",
    [
        ("", "`x` : no option to vary; expected one of negative_prompt"),
        ("size=1,2", "`x` size: no option to vary"),
        ("num_images=1,2", "`x` num_images: no option to vary"),
        ("steps", "`x` steps: expected values with commas between them, such as steps="),
        ("steps=4,", "expected values with commas between them"),
        ("steps=4,4", "a value is there twice"),
        ("steps=4,many", "`x` steps=many: expected N for each value"),
        ("steps=4.5,5", "`x` steps=4.5: expected N"),
        ("steps=0,5", "`x` steps=0: expected at least 1"),
        ("merge=sum,mean", "`x` merge=mean: expected sum or concat"),
        ("granularity=1:0,0:0:1", "`x` granularity=1:0: expected three non-negative numbers"),
        ("image_scale=1,nan", "`x` image_scale=nan: expected a finite number"),
    ],
)
def test_what_is_no_axis_is_told_by_its_name(text, found):
    with pytest.raises(UserError) as e:
        read_axis(text, "x")
    assert found in str(e.value), e.value


def test_every_option_of_a_picture_may_vary():
    assert {*SWEPT, "num_images", "at_once"} == set(SampleOptions.__dataclass_fields__)


def test_a_grid_has_rows_along_y_and_keeps_the_rest():
    x, y = read_axis("image_scale=0,1", "x"), read_axis("steps=2,3,4", "y")
    cells = grid(SampleOptions(seed=5), x, y)
    assert [[(c.image_scale, c.steps, c.seed) for c in row] for row in cells] == [
        [(0.0, n, 5), (1.0, n, 5)] for n in (2, 3, 4)
    ]
    with pytest.raises(UserError, match="`y` image_scale: varies along x already"):
        grid(SampleOptions(), x, x)
    with pytest.raises(UserError, match="`x`: 1 x 300 pictures; expected at most 256"):
        grid(SampleOptions(), Axis("seed", tuple(range(300)), ()), None)
    with pytest.raises(UserError, match="expected 0 <= start < end"):
        grid(SampleOptions(image_end=0.5), read_axis("image_start=0,0.7", "x"), None)
