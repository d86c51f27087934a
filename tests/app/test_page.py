"""The page over HTTP: a crowd, what it writes, and what it refuses."""

import asyncio
import http.client
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import skimage.data

from benchmarks import page
from benchmarks.page import FIRST, crowd, serving, upload
from dynaip_jax.app import main
from dynaip_jax.app.uploads import Limits
from tests.app.pages import address

pytest.importorskip("gradio", reason="gradio is not installed")

SMALL = {"Prompt": "a cup", "Height": 32, "Width": 32, "Steps": 1}
SLOW = {"Prompt": "a cup", "Height": 256, "Width": 256, "Steps": 60, "Num images": 4}
QUEUE, VISITS, LARGEST = 100, 110, 1 << 20  # the last: bytes of an upload
SOON = 2  # seconds that answers take, beside the work itself
GROWTH = 24 << 20  # bytes of memory that may come after the first ten
CUP = skimage.data.coffee()[::4, ::4]


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """Where a page may not write: home, the folder for temporary files but for one folder in it, and the current one."""
    return [tmp_path_factory.mktemp(name) for name in ("home", "temporary", "current")]


@pytest.fixture(scope="module")
def alone(tiny, outside):
    """A page in a process of its own."""
    home, temporary, current = outside
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "MPL", "HF_HOME"))}
    environment = mine | dict(HOME=str(home), TMPDIR=str(temporary), PYTHONPATH=os.pathsep.join(sys.path))
    words = ["--model", tiny[0], "--adapter", tiny[1], "--queue", QUEUE, "--upload", LARGEST >> 20]
    with serving(*words, environment=environment, folder=current) as server:
        yield server
    assert not list(temporary.iterdir()), "its folder goes with it"


def test_a_crowd_waits_is_refused_politely_past_the_limit_and_gets_its_pictures(alone):
    """All submit while a slow picture is drawn, which is cancelled once the queue is full."""
    forms = [SMALL | {"reference 1": upload(CUP), "Seed": n, "Image scale": n / 100} for n in range(VISITS)]
    began, shown, refused, held = threading.Event(), [], [], []

    def hold():
        for status, *_ in filter(None, alone.ask("generate", (alone.controls() | SLOW).values(), "holder")):
            shown.append(status)
            if "Waiting" not in status:
                began.set()

    def note(visit):
        (held if visit.settings else refused).append(alone.resident)
        if len(refused) == VISITS - QUEUE and not held:
            alone.call("cancel", [], "holder")

    holder = threading.Thread(target=hold)
    holder.start()
    assert began.wait(60)
    visits = crowd(alone, forms, note)
    holder.join()
    assert "Cancelled." in shown[-1]
    drawn = [(n, visit) for n, visit in enumerate(visits) if visit.settings]
    assert len(drawn) == QUEUE, "no picture was lost"
    for n, visit in drawn:
        assert "Done." in visit.status
        assert (visit.settings["seed"], visit.settings["image_scale"]) == (n, n / 100)
    told = f"queue: {QUEUE} pictures wait already; expected fewer than {QUEUE + 1}; try again in a minute"
    assert all(told in v.status and 'role="alert"' in v.status for v in visits if not v.settings)
    assert max(held[FIRST:]) - held[FIRST - 1] < GROWTH, f"MiB: {[size >> 20 for size in held]}"


def test_cancel_frees_the_queue_within_a_step(alone):
    """A visitor waits for a slow picture of another, who cancels it."""
    form = alone.controls() | SLOW | {"reference 1": upload(CUP), "True CFG": 4, "Negative prompt": "a cat"}
    steps, fourth, begun = [], threading.Event(), None  # steps: when each is seen

    def hold():
        for status, *_ in filter(None, alone.ask("generate", form.values(), "holder")):
            steps.append((time.monotonic(), status))
            if "Step 4 " in status:
                fourth.set()

    holder = threading.Thread(target=hold)
    holder.start()
    assert fourth.wait(60), steps
    seconds = (steps[-1][0] - steps[-4][0]) / 3
    for status, *_ in filter(None, alone.ask("generate", (alone.controls() | SMALL).values(), "next")):
        if "Waiting: 1 before" in status:
            alone.call("cancel", [], "holder")
            cancelled, before = time.monotonic(), len(steps)
        elif begun is None:
            begun = time.monotonic() - cancelled
    holder.join()
    assert "Done." in status and "Cancelled." in steps[-1][1]
    assert len([text for _, text in steps[before:] if "Step " in text]) <= 1
    assert begun < 2 * seconds + SOON, f"{seconds} s a step"


def test_nothing_is_written_outside_of_its_folder(alone, outside):
    home, temporary, current = outside
    form = alone.controls() | SMALL | {"reference 1": upload(CUP)}
    *_, (status, figure, *_) = alone.ask("maps", form.values(), "looker")
    assert "Done." in status and Path(figure["value"]["path"]).is_file()
    assert not list(home.iterdir()) and not list(current.iterdir())
    (folder,) = temporary.iterdir()
    assert folder.name.startswith("dynaip_serve_")


def test_compiled_programs_are_not_kept_for_a_page(monkeypatch):
    kept = []
    monkeypatch.setattr(main, "keep_compiled", lambda: kept.append(sys.argv[1]))
    for command in ("serve", "sample"):
        monkeypatch.setattr(sys, "argv", ["dynaip", command, "--queue", "0", "--steps", "0"])
        main.main()
    assert kept == ["sample"]


def test_errors_are_told_in_the_labels_of_the_page(alone):
    usual = alone.controls() | SMALL

    def said(**changes):
        *_, (status, *_) = alone.ask("generate", (usual | changes).values(), "one")
        return status

    text = said(**{"reference 1": address(b"<script>", "image/png")})
    assert "Reference: not as the page sends them" in text and 'role="alert"' in text
    text = said(**{"reference 1": json.dumps(dict(picture=address(b"<script>")))})
    assert "Reference 1: not a picture, or a broken one" in text and "`" not in text
    text = said(**{"reference 1": upload(CUP), "Words 1": "<i>"})
    assert "Words, subject 1: its words &#x27;&lt;i&gt;&#x27;" in text


def status_of(server, path, data=None):
    request = urllib.request.Request(server.address + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as e:
        return e.code


def test_no_path_or_address_from_a_request_is_opened(alone, outside, tmp_path, monkeypatch):
    """The file is a pipe that nobody writes to: who opens it does not answer."""
    monkeypatch.setattr(page, "PATIENCE", 60)
    (folder,) = outside[1].iterdir()
    mine = tmp_path / "mine.png"
    os.mkfifo(mine)
    for path in (mine, "/etc/passwd", folder / "matplotlib", f"{folder}/../{mine.name}", alone.address):
        assert status_of(alone, f"gradio_api/file={path}") == 403
    closed = (
        "upload",
        "run/generate",
        "api/generate",
        f"proxy={alone.address}",
        "run-history/buckets",
        "component_server",
    )
    assert {status_of(alone, f"gradio_api/{name}", b"{}") for name in closed} == {403}
    named = dict(path=str(mine), meta=dict(_type="gradio.FileData"))
    for value in (
        named,
        [named],
        str(mine),
        *(json.dumps({k: v}) for k in ("picture", "mask") for v in (str(mine), f"file://{mine}")),
    ):
        form = alone.controls() | SMALL | {"reference 1": value}
        try:
            *_, (status, *_) = alone.ask("generate", form.values(), "two")
            assert 'role="alert"' in status
        except RuntimeError as e:
            assert "event: error" in str(e)


def test_bodies_are_limited(alone):
    visitor = http.client.HTTPConnection(alone.address.rstrip("/").removeprefix("http://"), timeout=30)
    visitor.putrequest("POST", "/gradio_api/queue/join")
    visitor.putheader("Content-Length", str(13 * LARGEST))
    visitor.endheaders()
    assert visitor.getresponse().status == 413


def test_a_body_that_does_not_state_its_size_is_counted(tmp_path):
    sent = []

    async def app(scope, receive, send):
        while (await receive())["more_body"]:
            pass
        await send(dict(type="http.response.start", status=200))

    def status(pieces):
        rest = iter([dict(type="http.request", body=b"12345", more_body=n + 1 < pieces) for n in range(pieces)])

        async def receive():
            return next(rest)

        async def send(message):
            sent.append(message.get("status"))

        scope = dict(type="http", path="/", headers=[])
        asyncio.run(Limits(app, 12, tmp_path)(scope, receive, send))
        return next(one for one in reversed(sent) if one)

    assert [status(n) for n in (1, 2, 3)] == [200, 200, 413]


def test_command_line_is_checked_and_a_taken_port_is_told(dynaip, alone):
    port = int(alone.address.rstrip("/").rpartition(":")[2])
    for words, found in (
        (["--port", 0], "--port 0: expected a number from 1"),
        (["--queue", 0], "--queue 0: expected a number"),
        (["--upload", 1000], "--upload 1000: expected"),
        (["--port", port], f"--port {port}: cannot be listened to on 127.0.0.1"),
    ):
        status, out, err = dynaip("serve", *words)
        assert (status, out) == (2, "") and found in err, err
        assert "using the embedded model" not in err, "asked before weights are read"
