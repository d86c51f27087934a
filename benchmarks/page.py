"""A crowd on the page of `dynaip serve`: whether everybody gets the picture that they asked for, how long it takes, and what memory does.

python -m benchmarks.page [--visits N] [--rounds N] [--steps N] [--json]

Starts the page with the embedded model in a process of its own, whose CPU time `round_cpu_s` is. In each round `--visits` visitors submit at once, each a reference and a
seed of their own, and wait for their picture. `resident_MiB` is the memory of the page's process after 10 pictures, and after each round.
Needs the `serve` extra.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from PIL import Image

from benchmarks.output import show
from dynaip_jax import images
from dynaip_jax.shapeland import world

FIRST = 10  # pictures after which memory may not grow any more
PATIENCE = 600  # seconds
API = "gradio_api"


class Server(NamedTuple):
    """A page in a process of its own."""

    process: subprocess.Popen[str]
    address: str

    @property
    def resident(self) -> int:
        """Bytes of it that are in memory."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @property
    def spent(self) -> float:
        """Seconds of CPU time that it took so far."""
        user, system = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def controls(self) -> dict[str, Any]:
        """What a visitor sends with "generate", by labels, as it stands in the page at first."""
        with urllib.request.urlopen(f"{self.address}{API}/info", timeout=PATIENCE) as answer:
            parameters = json.load(answer)["named_endpoints"]["/generate"]["parameters"]
        return {each["label"]: each.get("parameter_default") for each in parameters}

    def call(self, name: str, inputs: Iterable[Any], visitor: str) -> str:
        """Calls `name` of the page -> the number under which its answer is to be had."""
        body = json.dumps(dict(data=list(inputs), session_hash=visitor))
        with self._answer("POST", f"/{API}/call/{name}", body) as answer:
            return json.load(answer)["event_id"]

    def ask(self, name: str, inputs: Iterable[Any], visitor: str) -> Iterator[list[Any]]:
        """The same -> what is shown of it, each time that it changes. A visitor's answers come in one stream, whoever asks for it."""
        event = self.call(name, inputs, visitor)
        with self._answer("GET", f"/{API}/call/{name}/{event}") as answer:
            kind = ""
            for line in map(bytes.decode, answer):
                if line.startswith("event: "):
                    kind = line[7:].strip()
                elif line.startswith("data: ") and kind in ("generating", "complete"):
                    yield json.loads(line[6:])
                elif line.startswith("data: ") and kind == "error":
                    raise RuntimeError(f"event: error, {line}")

    @contextmanager
    def _answer(self, method: str, path: str, body: str | None = None) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(urlsplit(self.address).netloc, timeout=PATIENCE)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise RuntimeError(f"{path}: status {answer.status}")
            yield answer
        finally:
            connection.close()


@contextmanager
def serving(
    *words: object, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> Iterator[Server]:
    """`dynaip serve` with more `words` and a free port, in a current `folder`; it is ended by SIGTERM at last."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dynaip_jax.app.main", "serve", "--port", str(port), *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError(f"dynaip serve ended with status {process.wait()}")
        yield Server(process, address)
    finally:
        process.terminate()
        process.wait()


class Visit(NamedTuple):
    """What a visitor got: the last text about the job, the settings in the picture's PNG (None: no picture), and how long that took."""

    status: str
    settings: dict[str, Any] | None
    seconds: float


def crowd(server: Server, forms: Sequence[dict[str, Any]], done: Callable[[Visit], None]) -> list[Visit]:
    """Visitors who all submit at once, each a form of his own by labels; `done` is called with each as it ends."""
    usual = server.controls()

    def visit(number: int) -> Visit:
        began = time.monotonic()
        *_, (status, picture, *_) = server.ask("generate", (usual | forms[number]).values(), f"visitor{number}")
        settings = None
        if picture and "path" in picture:
            with urllib.request.urlopen(f"{server.address}{API}/file={picture['path']}", timeout=PATIENCE) as answer:
                settings = images.read_settings(answer.read())
        done(made := Visit(status, settings, time.monotonic() - began))
        return made

    with ThreadPoolExecutor(len(forms)) as pool:
        return list(pool.map(visit, range(len(forms))))


def upload(picture: Any) -> str:
    """A reference, uint8 `[h, w, 3]`, as the page sends it."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return json.dumps(dict(picture=f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"))


def main() -> int:
    """Prints the figures; 1 if a picture was lost or mixed up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--visits", type=int, default=100, help="at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of a picture")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    held: list[int] = []
    wrong, seconds, spent = 0, [], []
    with tempfile.TemporaryDirectory() as folder, serving("--queue", args.visits, folder=Path(folder)) as server:
        for each in range(args.rounds):
            seeds = range(args.visits * each, args.visits * (each + 1))
            forms = [
                {"Seed": seed, "Steps": args.steps, "reference 1": upload(world.drawing("star", seed % 5))}
                for seed in seeds
            ]
            before = server.spent
            visits = crowd(server, forms, lambda _: held.append(server.resident))
            wrong += sum(
                v.settings is None or v.settings["seed"] != seed for v, seed in zip(visits, seeds, strict=True)
            )
            seconds.append(round(max(visit.seconds for visit in visits), 1))
            spent.append(round(server.spent - before, 1))
    marks = [FIRST, *(args.visits * (each + 1) for each in range(args.rounds))]
    show(
        dict(
            visits=args.visits, lost_or_mixed_up=wrong, round_s=seconds, round_cpu_s=spent,
            resident_MiB={f"after {mark}": held[mark - 1] >> 20 for mark in marks},
        ),
        args.json,
    )  # fmt: skip
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
