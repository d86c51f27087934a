"""The page itself, in Gradio: how the studio looks, and nothing that it knows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from dynaip_jax.app import controls, widgets
from dynaip_jax.app.controls import Control
from dynaip_jax.app.studio import SUBJECTS, Drawn, Form, Studio, differences
from dynaip_jax.app.turns import OVER, Job
from dynaip_jax.errors import UserError

EVERY, SELDOM = 0.1, 3.0  # seconds between looks at a job: while it is worked at, and at most where many are before it
SHOWN = 24  # pictures of a session that the gallery shows
PROMPT = 2000  # characters
GONE = "`picture`: is no longer kept here; expected one of the last; load its PNG, if you saved it"


class Parts(NamedTuple):
    """The components that handlers read and write."""

    prompt: gr.Textbox
    values: list[gr.Textbox]
    words: list[gr.Textbox]
    options: list[Any]
    status: gr.HTML
    picture: gr.Image
    kept: gr.Image
    table: gr.HTML
    gallery: gr.Gallery
    maps: gr.Image
    made: gr.State
    first: gr.State

    @property
    def inputs(self) -> list[Any]:
        """What a form is read from."""
        return [self.prompt, *self.values, *self.words, *self.options]


def build(studio: Studio, title: str, hint: str, first: str) -> gr.Blocks:
    """The page of a studio. `hint`: what to know of the model; `first`: the prompt that stands there at first."""
    with gr.Blocks(title="dynaip", analytics_enabled=False) as page:
        gr.Markdown(f"# {title}\n{hint}")
        with gr.Row():
            with gr.Column(min_width=300):
                prompt = gr.Textbox(first, label=controls.label("prompt"), elem_id="prompt", max_length=PROMPT)
                values, words = zip(*(_reference(n, studio.largest) for n in range(1, SUBJECTS + 1)), strict=True)
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", elem_id="draw")
                    stop = gr.Button("Cancel", variant="stop", elem_id="cancel")
                options = _options(studio.controls)
            with gr.Column(min_width=300):
                status = gr.HTML(elem_id="status")
                with gr.Row():
                    kept, picture = _image("Kept", visible=False), _image("Picture")
                with gr.Row():
                    keep = gr.Button("Keep beside the next", elem_id="keep")
                    look = gr.Button("Show maps", elem_id="look")
                table, maps = gr.HTML(elem_id="differences"), _image("Maps", visible=False)
                gallery = gr.Gallery(
                    label="Made here (a click loads its settings)", format="png", interactive=False, elem_id="gallery",
                    columns=4, allow_preview=False, buttons=[],
                )  # fmt: skip
                load = _settings(studio.largest)
        shown = (status, picture, kept, table, gallery, maps, gr.State([]), gr.State(None))
        _connect(page, studio, Parts(prompt, list(values), list(words), options, *shown), draw, stop, keep, look, load)
    return page


def _image(label: str, *, visible: bool = True) -> gr.Image:
    """A picture that is shown; its PNG, which can be saved, holds its settings."""
    return gr.Image(
        label=label, visible=visible, elem_id=label.lower(), type="filepath", format="png", interactive=False, min_width=140,
        buttons=["download", "fullscreen"],
    )  # fmt: skip


def _reference(number: int, largest: int) -> tuple[gr.Textbox, gr.Textbox]:
    """The hidden field of a reference, and its words."""
    with gr.Accordion(f"Reference {number}", open=number == 1):
        gr.HTML(widgets.upload(f"value-{number}", f"Reference {number}", largest, mask=True))
        value = gr.Textbox(label=f"reference {number}", elem_id=f"value-{number}", visible="hidden")
        words = gr.Textbox(
            label=f"Words {number}",
            info="of the prompt that name it, such as: star",
            elem_id=f"words-{number}",
            max_length=PROMPT,
        )
    return value, words


def _settings(largest: int) -> gr.Textbox:
    """The hidden field of a picture whose settings are to be loaded."""
    gr.HTML(widgets.upload("value-settings", "Load the settings of a PNG", largest, mask=False))
    return gr.Textbox(label="settings", elem_id="value-settings", visible="hidden")


def _options(known: list[Control]) -> list[Any]:
    """A component for each control, those of references apart."""
    made: dict[str, Any] = {}
    for title, reference in (("Picture", False), ("References", True)):
        with gr.Accordion(f"Options: {title}", open=False):
            for control in known:
                if control.reference == reference:
                    made[control.name] = _component(control)
    return [made[control.name] for control in known]


def _component(control: Control) -> Any:
    own = dict(
        label=controls.label(control.name), info=control.doc, elem_id=f"option-{control.name}", value=control.value
    )
    if control.kind == "slider":
        assert control.reach is not None
        low, high, step = control.reach
        return gr.Slider(low, high, step=step, **own)
    if control.kind == "choice":
        return gr.Radio(list(control.choices), **own)
    if control.kind == "switch":
        return gr.Checkbox(**own)
    return gr.Number(precision=0, **own) if control.kind == "number" else gr.Textbox(max_length=PROMPT, **own)


def _connect(
    page: gr.Blocks, studio: Studio, parts: Parts, draw: Any, stop: Any, keep: Any, look: Any, load: Any
) -> None:
    """What buttons do."""
    do = Handlers(studio)
    how: Any = dict(concurrency_limit=None, show_progress="hidden")  # the studio's own queue has the limit
    shown = [parts.status, parts.picture, parts.gallery, parts.table, parts.made]
    drawing: Any = [draw.click, parts.prompt.submit]
    gr.on(drawing, do.generate, [*parts.inputs, parts.made, parts.first], shown, api_name="generate", **how)
    look.click(do.maps, parts.inputs, [parts.status, parts.maps], api_name="maps", **how)
    stop.click(do.cancel, None, None, api_name="cancel", **how)
    page.unload(do.cancel)
    how |= dict(api_visibility="private")
    keep.click(do.keep, [parts.made], [parts.first, parts.kept], **how)
    settings = [parts.status, parts.prompt, *parts.words, *parts.options]
    load.change(do.load, [load], settings, **how)
    parts.gallery.select(do.select, [parts.made], settings, **how)


class Handlers:
    """What events do, and the jobs of each visitor, so that they may be cancelled. A picture made is its path and its settings."""

    def __init__(self, studio: Studio):
        self._studio = studio
        self._jobs: dict[str, set[Job]] = {}

    async def generate(self, request: gr.Request, *given: Any) -> AsyncIterator[tuple[Any, ...]]:
        """Draws what the page says; shows steps, then the picture, the gallery with it, and what differs from the one kept."""
        *inputs, made, first = given
        async for status, drawn in self._follow(request, lambda: self._studio.generate(self._form(inputs))):
            if drawn is None:
                yield status, gr.skip(), gr.skip(), gr.skip(), gr.skip()
                continue
            made = [*((str(path), drawn.settings) for path in drawn.files), *(made or [])][:SHOWN]
            table = "" if first is None else widgets.table(differences(first[1], drawn.settings), "Kept", "Picture")
            yield status, made[0][0], [path for path, _ in made], table, made

    async def maps(self, request: gr.Request, *given: Any) -> AsyncIterator[tuple[Any, Any]]:
        """Draws the maps of what the page says."""
        async for status, drawn in self._follow(request, lambda: self._studio.maps(self._form(given))):
            yield status, gr.skip() if drawn is None else gr.Image(str(drawn.files[0]), visible=True)

    def cancel(self, request: gr.Request) -> None:
        """Ends what a visitor waits for."""
        for job in list(self._jobs.get(request.session_hash or "", ())):
            job.cancel()

    def keep(self, made: list[Any]) -> tuple[Any, Any]:
        """The last picture stays beside the next."""
        return (made[0], gr.Image(made[0][0], visible=True)) if made else (None, gr.Image(visible=False))

    def load(self, sent: str) -> list[Any]:
        """The page as the settings of an uploaded PNG say."""
        try:
            content = self._studio.subject(sent, "").picture
            return self._nothing() if content is None else self._set(content)
        except UserError as e:
            return [widgets.problem(e), *self._nothing()[1:]]

    def select(self, chosen: gr.SelectData, made: list[Any]) -> list[Any]:
        """The page as the settings of a picture in the gallery say, which is known by its place there."""
        if not isinstance(chosen.index, int) or not 0 <= chosen.index < len(made):
            return self._nothing()
        try:
            return self._set(Path(made[chosen.index][0]).read_bytes())
        except OSError:
            return [widgets.problem(UserError(GONE)), *self._nothing()[1:]]
        except UserError as e:
            return [widgets.problem(e), *self._nothing()[1:]]

    async def _follow(self, request: gr.Request, submit: Callable[[], Job]) -> AsyncIterator[tuple[str, Drawn | None]]:
        """What is to be shown of a job until it is over, and at the end what it made."""
        try:
            job = await asyncio.to_thread(submit)
        except UserError as e:
            yield widgets.problem(e), None
            return
        visitor, before = request.session_hash or "", None
        self._jobs.setdefault(visitor, set()).add(job)
        try:
            while True:
                now = self._studio.snapshot(job)
                if (now.state, now.ahead, now.step) != before:
                    before = (now.state, now.ahead, now.step)
                    yield widgets.status(now, now.result.told if now.result else ()), now.result
                if now.state in OVER:
                    return
                await asyncio.sleep(min(EVERY * (1 + now.ahead), SELDOM))
        finally:
            job.cancel()
            self._jobs[visitor].discard(job)
            if not self._jobs[visitor]:
                del self._jobs[visitor]

    def _form(self, given: Sequence[Any]) -> Form:
        """What stands in the page. Raises `UserError` for pictures that are not as the page sends them."""
        prompt, rest = given[0], given[1:]
        sent, words, options = rest[:SUBJECTS], rest[SUBJECTS : 2 * SUBJECTS], rest[2 * SUBJECTS :]
        subjects = [self._studio.subject(value or "", text or "") for value, text in zip(sent, words, strict=True)]
        names = [control.name for control in self._studio.controls]
        return Form(prompt or "", dict(zip(names, options, strict=True)), subjects)

    def _set(self, content: bytes) -> list[Any]:
        prompt, values, words, lines = self._studio.loaded(content)
        padded = [*words, *[""] * (SUBJECTS - len(words))]
        status = f'<p role="status">Settings loaded.</p>{widgets.told(lines)}'
        return [status, prompt, *padded, *(values[control.name] for control in self._studio.controls)]

    def _nothing(self) -> list[Any]:
        return [gr.skip() for _ in range(2 + SUBJECTS + len(self._studio.controls))]
