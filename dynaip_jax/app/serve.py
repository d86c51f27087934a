"""`dynaip serve`: a page on this machine that draws."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynaip_jax.app.opening import Loading, open_for
from dynaip_jax.commandline import argument, parse
from dynaip_jax.errors import UserError, reason
from dynaip_jax.interrupts import litter
from dynaip_jax.tasks import task

if TYPE_CHECKING:
    from dynaip_jax.app.studio import Studio
    from dynaip_jax.sampling.opening import Opened

EXAMPLES = """
examples:
  dynaip serve
      http://127.0.0.1:7860 with the embedded model of Shapeland
  dynaip serve --model bundles/flux-dev --adapter adapters/mine --port 8000
"""
PORTS = 65535
LARGEST_UPLOAD = 100  # MiB
HOME = "127.0.0.1"
MORE = 32  # events that Gradio handles at once beside those that wait in the studio's queue, so that it has none of its own


@dataclass(frozen=True)
class Arguments(Loading):
    """Serves a page that draws: prompt, references with words or painted masks, every option, a preview of the steps, maps, and two
    pictures side by side. Nobody is asked who they are: keep it on this machine, or behind something that does."""

    host: str = argument("address that is listened to; 0.0.0.0 lets the network in", default=HOME, unit="ADDRESS")
    port: int = argument("of the page", default=7860, unit="N")
    queue: int = argument("generations that may wait; more are refused", default=16, unit="N")
    upload: int = argument("largest picture that is taken, in MiB", default=10, unit="N")


def main(argv: Sequence[str]) -> int:
    """Serves until it is ended; prints the address."""
    args = parse(Arguments, argv, "dynaip serve", EXAMPLES)
    for name, value, most in (
        ("port", args.port, PORTS),
        ("queue", args.queue, 10_000),
        ("upload", args.upload, LARGEST_UPLOAD),
    ):
        if not 1 <= value <= most:
            raise UserError(f"`{name}` {value}: expected a number from 1 to {most}")
    for library, extra in (("gradio", "serve"), ("matplotlib", "plot")):
        if importlib.util.find_spec(library) is None:
            raise UserError(f"{library} is missing; expected it for the page; pip install 'dynaip_jax[{extra}]'")
    check_free(args.host, args.port)
    opened = open_for(args, with_references=args.model is None or args.adapter is not None)
    folder = Path(tempfile.mkdtemp(prefix="dynaip_serve_")).resolve()
    try:
        with litter(folder):
            _serve(opened, folder, args)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def check_free(host: str, port: int) -> None:
    """Raises `UserError` for an address that cannot be listened to; asked before weights are read."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as e:
        raise UserError(
            f"`port` {port}: cannot be listened to on {host} ({reason(e)}); expected a free port; pass another `port`"
        ) from e


def _serve(opened: Opened, folder: Path, args: Arguments) -> None:
    """Until it is ended."""
    from dynaip_jax.app.studio import Studio

    with task(f"loading {opened.model.bundle.path}"):
        studio = Studio(opened, folder, args.queue, args.upload << 20)
    page, address = start(studio, args.host, args.port)
    print(address, flush=True)
    if args.host not in (HOME, "localhost", "::1"):
        print(f"warning: --host {args.host}: whoever reaches this address may use the page", file=sys.stderr)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)
        studio.close()


def start(studio: Studio, host: str = HOME, port: int | None = None) -> tuple[Any, str]:
    """Serves the page of a studio in threads of its own -> the page, whose `close` ends that, and its address. `port` None: a free one.
    Raises `OSError` where the address cannot be had."""
    os.environ |= dict(  # Gradio and matplotlib read them as they are imported
        GRADIO_TEMP_DIR=str(studio.folder), GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False",
        MPLCONFIGDIR=str(studio.folder / "matplotlib"),
    )  # fmt: skip
    import gradio as gr
    from starlette.middleware import Middleware

    from dynaip_jax.app import page, widgets
    from dynaip_jax.app.uploads import Limits

    built = page.build(studio, *words_of(studio))
    built.queue(max_size=None, default_concurrency_limit=None)
    fonts: Any = dict(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # nothing is fetched from elsewhere
    theme = gr.themes.Default(**fonts).set(
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"
    )
    _, address, _ = built.launch(
        server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, inbrowser=False, ssr_mode=False,
        pwa=False, mcp_server=False, enable_monitoring=False, footer_links=[], max_file_size=studio.largest, css=widgets.CSS,
        head=widgets.SCRIPT, theme=theme, max_threads=studio.most + MORE,
        app_kwargs=dict(middleware=[Middleware(Limits, most=12 * studio.largest, folder=studio.folder)]),
    )  # fmt: skip
    return built, address


def words_of(studio: Studio) -> tuple[str, str, str]:
    """Title, hint and first prompt of a page."""
    from dynaip_jax.shapeland import default
    from dynaip_jax.shapeland.world import caption_words

    model = studio.pipe.bundle.path
    if Path(str(model)) != default.paths()[0]:
        return "DynaIP", f"Model: `{Path(str(model)).name}`", "a toy robot on a beach at sunset"
    words = ", ".join(caption_words())
    hint = f"The embedded model of Shapeland draws 64 x 64 pixels, and knows these words: {words}. Its references are drawn shapes, seen close."
    return "DynaIP in Shapeland", hint, "a star on the left on sand at noon"
