"""What the page does, without a browser: forms, pictures, settings, and an end at the next step."""

import io
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import skimage.data
from PIL import Image

from dynaip_jax import images
from dynaip_jax.app.studio import Form, Studio, Subject, differences
from dynaip_jax.app.turns import CANCELLED, DONE, FAILED, OVER
from dynaip_jax.errors import UserError
from dynaip_jax.sampling.opening import open_model
from tests.app.pages import half, png, upload
from tests.images.test_writing import failing, names

SMALL = dict(height=32, width=32, steps=2)
SOON = 60


@pytest.fixture(scope="module")
def studio(tiny, tmp_path_factory):
    made = Studio(open_model(*tiny), tmp_path_factory.mktemp("studio"), most=2, largest=1 << 20)
    yield made
    made.close()


@pytest.fixture(scope="module")
def cup():
    return png(skimage.data.coffee()[::4, ::4])


def form(studio, prompt="a cup", *subjects, **values):
    shown = {control.name: control.value for control in studio.controls}
    return Form(prompt, shown | SMALL | values, subjects)


def over(studio, job):
    end = time.monotonic() + SOON
    while (now := studio.snapshot(job)).state not in OVER:
        assert time.monotonic() < end
        time.sleep(0.01)
    return now


def test_pictures_are_those_of_the_pipeline_and_their_settings_come_back(studio, cup):
    asked = form(studio, "a cup", Subject(cup, "cup"), seed=4, num_images=2, image_scale=0.5)
    now = over(studio, studio.generate(asked))
    assert now.state == DONE, now.error
    alone = studio.pipe("a cup", cup, words="cup", seed=4, num_images=2, image_scale=0.5, **SMALL)
    for k, path in enumerate(now.result.files):
        assert path.parent == studio.folder
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(alone.images[k]))
        assert images.read_settings(path)["seed"] == 4 + k
    prompt, values, words, told = studio.loaded(now.result.files[1].read_bytes())
    assert (prompt, words) == ("a cup", ["cup"]) and "upload them to draw it again" in told[0]
    assert (values["seed"], values["image_scale"], values["steps"]) == (5, 0.5, 2)
    again = over(studio, studio.generate(Form(prompt, values | dict(num_images=1), [Subject(cup, *words)])))
    assert again.result.files[0].read_bytes() != b"" and again.result.settings["seed"] == 5
    np.testing.assert_array_equal(
        *(np.asarray(Image.open(r.files[k])) for r, k in ((now.result, 1), (again.result, 0)))
    )
    assert ("Seed", "4", "5") in differences(now.result.settings, again.result.settings)


def test_without_references_the_base_draws(studio):
    now = over(studio, studio.generate(form(studio)))
    assert now.result.settings["adapter"] is None and "reference" not in now.result.settings


def test_masks_words_and_maps(studio, cup):
    two = [Subject(cup, mask=half("left")), Subject(cup, mask=half("right"))]
    _, request = studio.request(form(studio, "a cup", *two))
    assert request.mode == "masks" and request.where["region"].shape == (1, 2, 4)
    named = form(studio, "a cup and a cat", Subject(cup, "cup"), Subject(cup, "cat"), num_images=3)
    now = over(studio, studio.maps(named))
    assert now.state == DONE, now.error
    assert len(now.result.files) == 1 and min(Image.open(now.result.files[0]).size) > 200
    with pytest.raises(UserError, match="`references`: none given"):
        studio.maps(form(studio))


def test_a_job_shows_its_steps_and_ends_at_the_next(studio, cup):
    seen, view = [], studio._progress

    def slow(job, request):
        progress = view(job, request)

        def step(*given):
            time.sleep(0.05)
            progress.view(*given)
            seen.append(studio.snapshot(job))

        return type(progress)(view=step)

    studio._progress = slow
    try:
        job = studio.generate(form(studio, steps=50))
        while len(seen) < 2:
            time.sleep(0.01)
        job.cancel()
        count = len(seen)
        after = studio.generate(form(studio, steps=2))
        assert over(studio, job).state == CANCELLED and len(seen) <= count + 1
        assert over(studio, after).state == DONE
    finally:
        studio._progress = view
    assert [(now.step, now.steps) for now in seen[:2]] == [(1, 50), (2, 50)]
    assert seen[0].shown.size == (32, 32)


def test_what_waits_takes_the_memory_of_its_files_and_not_of_its_pictures(studio):
    side = 3000
    large = png(np.zeros((side, side, 3), np.uint8))
    asked = form(studio, "a cup", Subject(large))
    holds, begun = threading.Event(), threading.Event()

    def work(job):
        begun.set()
        assert holds.wait(SOON)

    studio._turns.submit(work)
    assert begun.wait(SOON)
    tracemalloc.start()
    try:
        studio._check(asked)
        _, alone = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        with ThreadPoolExecutor(2) as pool:
            jobs = list(pool.map(studio.generate, [asked] * studio.most))
        after, both = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        holds.set()
    picture = side * side * 3
    assert alone > picture > len(large) * 10
    assert after - before < picture / 4
    assert both < alone + picture / 4, "one at a time is decoded"
    for job in jobs:
        assert over(studio, job).state == DONE


def test_a_full_disk_is_told_and_leaves_nothing_half_written(studio, monkeypatch, capsys):
    before = names(studio.folder)
    with monkeypatch.context() as context:
        failing(context, studio.folder)
        now = over(studio, studio.generate(form(studio)))
    assert now.state == FAILED and str(now.error).startswith("picture: the page cannot keep it; expected room")
    assert "No space left on device" in capsys.readouterr().err
    assert names(studio.folder) == before
    assert over(studio, studio.generate(form(studio))).state == DONE


@pytest.mark.parametrize(
    "sent, found",
    [
        ("{", "`references`: not as the page sends them"),
        ("[1]", "`references`: not as the page sends them"),
        ('{"picture": "/etc/passwd"}', "`references`: not an uploaded file"),
        ('{"picture": {"path": "/etc/passwd"}}', "`references`: not an uploaded file"),
        ('{"picture": "data:image/png;base64,@@"}', "`references`: the upload is damaged"),
        ('{"mask": "http://127.0.0.1/a.png"}', "`masks`: not an uploaded file"),
        (upload(b"0" * (1 << 20) + b"0"), "`references`: more than 1 MiB"),
        ("0" * (5 << 20), "`references`: the upload is too large"),
    ],
)
def test_uploads_that_are_none_are_refused_and_no_path_is_opened(studio, sent, found, monkeypatch):
    monkeypatch.setattr(io, "open", lambda *_, **__: pytest.fail("a file was opened"))
    with pytest.raises(UserError) as e:
        studio.subject(sent, "")
    assert found in str(e.value)


def test_forms_that_do_not_fit_are_refused(studio, cup):
    for asked, found in (
        (form(studio, " "), "`prompt`: is empty"),
        (form(studio, "a cup", Subject(b"not a picture")), "`references` 1: not a picture, or a broken one"),
        (form(studio, "a cup", Subject(None, "cup")), "`references`: words or a mask without a picture"),
        (form(studio, "a cup", Subject(cup, "dog")), "`words`, subject 1: its words 'dog' are not in the prompt"),
        (form(studio, "a cup", Subject(cup, mask=half("left")), Subject(cup)), "`masks`: 1 masks for 2 references"),
        (form(studio, "a cup", *[Subject(cup)] * 5), "`references`: 5 pictures; expected at most 4"),
        (form(studio, steps=0), "`steps` 0: expected at least 1"),
    ):
        with pytest.raises(UserError) as e:
            studio.generate(asked)
        assert found in str(e.value), e.value
    with pytest.raises(UserError, match="settings: holds no settings"):
        studio.loaded(cup)
