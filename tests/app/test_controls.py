"""Controls of the page: all options, there and back."""

import dataclasses

import pytest

from dynaip_jax.app import controls
from dynaip_jax.errors import UserError
from dynaip_jax.sampling.options import SampleOptions

DEFAULTS = dict(steps=16, true_cfg=2.5, height=64, width=64)
KNOWN = controls.controls(DEFAULTS, 16, takes_guidance=False)
SHOWN = {control.name: control.value for control in KNOWN}


def test_every_option_has_a_control():
    names = {*SHOWN, *controls.LEFT_OUT, "guidance"} - {*controls.LEVELS}
    assert names == {f.name for f in dataclasses.fields(SampleOptions)}
    assert "guidance" in {c.name for c in controls.controls(DEFAULTS | dict(guidance=3.5), 16, takes_guidance=True)}
    for control in KNOWN:
        if control.kind == "slider":
            low, high, step = control.reach
            assert low <= control.value <= high and step > 0, control
        assert control.doc and controls.label(control.name)[0].isupper()


def test_what_the_page_shows_at_first_are_the_defaults():
    how = dict(multiple=16, takes_guidance=False)
    options = controls.options(SHOWN)
    assert options.filled(DEFAULTS, **how) == SampleOptions(seed=0, num_images=1).filled(DEFAULTS, **how)
    plain = {k: v for k, v in DEFAULTS.items() if k != "true_cfg"}
    shown = {c.name: c.value for c in controls.controls(plain, 16, takes_guidance=False)}
    assert controls.options(shown).filled(plain | dict(guidance=None), **how).true_cfg is None


def test_settings_of_a_picture_come_back():
    options = dict(steps=5, image_scale=0.4, text_gain=0.2, granularity=(0.0, 0.5, 0.5), seed=9, fit="crop", regions="none", cache_threshold=0.1)  # fmt: skip
    given = SampleOptions(**options)
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(given).items()}
    settings |= dict(height=64, width=32, true_cfg=2.5, negative_prompt="")
    back = controls.options(controls.values(settings, KNOWN))
    for name, value in options.items():
        assert getattr(back, name) == value, name
    assert (back.height, back.width) == (64, 32)


@pytest.mark.parametrize(
    "settings, found",
    [
        (dict(steps="many"), "`steps` many: expected a whole number"),
        (dict(image_scale={"a": 1}), "`image_scale`"),
        (dict(granularity=[1, 2]), "`granularity`"),
        (dict(granularity=["a", "b", "c"]), "`granularity`"),
        (dict(seed=[]), "`seed`"),
        (dict(fit="squash"), "`fit` squash: expected pad or crop"),
    ],
)
def test_settings_that_are_none_are_refused(settings, found):
    with pytest.raises(UserError) as e:
        controls.values(settings, KNOWN)
    assert found in str(e.value)


def test_what_a_request_makes_up_is_refused():
    for values in (dict(steps="4"), dict(image_scale=[[1]]), dict(granularity=False), dict(fit=3), dict(seed=1.5)):
        with pytest.raises(UserError):
            controls.options(SHOWN | values if "granularity" not in values else values)
