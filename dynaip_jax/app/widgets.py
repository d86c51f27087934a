"""The page's own HTML: where pictures are chosen and masks painted, and how a job stands. All texts of others are escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from dynaip_jax.app import controls
from dynaip_jax.app.turns import CANCELLED, DONE, FAILED, WAITING, Snapshot
from dynaip_jax.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

CANVAS = 256  # pixels of the canvas for masks
BRUSH = 36  # of them, its width
ACCEPTED = "image/png,image/jpeg,image/webp,image/tiff,image/bmp,image/gif,image/avif,.ppm"
FILLS = ("left", "middle", "right")  # parts of a mask that a button fills

CSS = """
.dynaip-upload img { max-height: 10rem; max-width: 100%; }
.dynaip-upload canvas { width: min(16rem, 100%); border: 1px solid gray; background: black; touch-action: none; cursor: crosshair; }
.dynaip-upload button, .dynaip-upload input { min-height: 2.4rem; margin: .2rem .2rem .2rem 0; }
.dynaip-upload button { border: 1px solid gray; border-radius: .3rem; padding: 0 .7rem; }
.dynaip-problem { color: #b00020; font-weight: 600; }
.dark .dynaip-problem { color: #ff8a80; }
.dynaip-status img { width: min(24rem, 100%); }
.dynaip-status progress { width: 100%; }
.image-container { padding-top: 2.4rem; }
.image-container .image-frame { width: 100%; overflow-x: auto; }
.image-container:not(:fullscreen) .image-frame img { object-fit: contain; }
#picture .image-container:not(:fullscreen) img, #kept .image-container:not(:fullscreen) img { max-height: 24rem; }
#maps .image-container:not(:fullscreen) .image-frame { justify-content: flex-start; }
#maps .image-container:not(:fullscreen) img { min-width: 50rem; }
#gallery .grid-wrap { min-height: 7rem; padding-top: 2.4rem; }
#gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(5rem, 7rem)); }
footer { display: none !important; }
"""

# One listener for all widgets: pages that are drawn anew lose none. A widget's value goes into the hidden text field that its data-value names.
SCRIPT = """
<script>
(() => {
  const widget = (node) => node.closest && node.closest(".dynaip-upload");
  const state = new WeakMap();
  const of = (w) => { if (!state.has(w)) state.set(w, {}); return state.get(w); };
  const say = (w, text) => { w.querySelector(".dynaip-problem").textContent = text; };
  const send = (w) => {
    const field = document.querySelector(`#${w.dataset.value} textarea, #${w.dataset.value} input`);
    const { picture, mask } = of(w);
    const text = picture || mask ? JSON.stringify({ picture: picture || "", mask: mask || "", at: Date.now() }) : "";
    const kind = field instanceof HTMLTextAreaElement ? HTMLTextAreaElement : HTMLInputElement;
    Object.getOwnPropertyDescriptor(kind.prototype, "value").set.call(field, text);
    field.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const show = (w, address) => {
    const image = w.querySelector("img"), remove = w.querySelector("[data-fill=remove]");
    if (!image) return;
    remove.hidden = !address; image.hidden = true; image.onload = () => { image.hidden = false; };
    if (address) { image.src = address; } else { image.removeAttribute("src"); }
  };
  const painted = (w) => { of(w).mask = w.querySelector("canvas").toDataURL("image/png"); send(w); };
  const clear = (w) => {
    const canvas = w.querySelector("canvas");
    if (canvas) { canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height); }
    of(w).mask = "";
  };
  document.addEventListener("change", (e) => {
    const w = widget(e.target);
    if (!w || e.target.type !== "file") return;
    say(w, "");
    const file = e.target.files[0];
    of(w).picture = "";
    show(w, "");
    if (!file) return send(w);
    if (file.size > Number(w.dataset.largest)) {
      e.target.value = "";
      say(w, `${file.name}: more than ${w.dataset.largest >> 20} MiB; use a smaller file`);
      return send(w);
    }
    const reader = new FileReader();
    reader.onload = () => {
      if (e.target.files[0] !== file) return;  // another was chosen since
      of(w).picture = "data:" + (file.type || "application/octet-stream") + ";base64," + reader.result.split(",")[1];
      show(w, reader.result);
      send(w);
    };
    reader.readAsDataURL(file);
  });
  document.addEventListener("click", (e) => {
    if (e.target.matches(".dynaip-once input")) e.target.value = "";  // the same file may be chosen again
    const w = widget(e.target), fill = e.target.dataset ? e.target.dataset.fill : undefined;
    if (!w || fill === undefined) return;
    if (fill === "none") { clear(w); return send(w); }
    if (fill === "remove") {
      clear(w); of(w).picture = ""; w.querySelector("input").value = ""; show(w, ""); say(w, "");
      return send(w);
    }
    const canvas = w.querySelector("canvas"), brush = canvas.getContext("2d");
    brush.fillStyle = "white";
    brush.fillRect(["left", "middle", "right"].indexOf(fill) * canvas.width / 3, 0, canvas.width / 3, canvas.height);
    painted(w);
  });
  let drawing = null;
  const stroke = (e) => {
    const box = drawing.getBoundingClientRect(), brush = drawing.getContext("2d");
    const x = (e.clientX - box.left) * drawing.width / box.width, y = (e.clientY - box.top) * drawing.height / box.height;
    brush.strokeStyle = "white"; brush.lineCap = "round"; brush.lineWidth = Number(drawing.dataset.brush);
    brush.beginPath(); brush.moveTo(drawing.last ? drawing.last[0] : x, drawing.last ? drawing.last[1] : y); brush.lineTo(x, y);
    brush.stroke(); drawing.last = [x, y];
  };
  document.addEventListener("pointerdown", (e) => {
    if (!(e.target instanceof HTMLCanvasElement) || !widget(e.target)) return;
    drawing = e.target; drawing.last = null; stroke(e); e.preventDefault();
  });
  document.addEventListener("pointermove", (e) => { if (drawing) stroke(e); });
  document.addEventListener("pointerup", () => { if (drawing) { const w = widget(drawing); drawing = null; painted(w); } });
  const ALTS = { picture: "the picture drawn", kept: "the picture kept", maps: "where the references act", gallery: "a picture made here" };
  new MutationObserver(() => {  // Gradio gives its pictures no texts
    for (const [id, text] of Object.entries(ALTS)) {
      for (const image of document.querySelectorAll(`#${id} img`)) { if (!image.alt) image.alt = text; }
    }
  }).observe(document, { childList: true, subtree: true, attributes: true, attributeFilter: ["alt", "src"] });
})();
</script>
"""


def upload(value: str, text: str, largest: int, *, mask: bool) -> str:
    """A file field called `text` whose content goes into the hidden field `value`; with a canvas for a `mask`."""
    painting = ""
    if mask:
        fills = "".join(f'<button type="button" data-fill="{part}">{part}</button>' for part in FILLS)
        painting = f"""<details><summary>Where it may appear</summary>
          <p>Paint white where this subject may be, or fill a third of the picture. Nothing painted: anywhere, or where its words say.</p>
          <canvas width="{CANVAS}" height="{CANVAS}" data-brush="{BRUSH}" role="img" aria-label="mask of {escape(text)}"></canvas><br>
          {fills}<button type="button" data-fill="none">clear</button></details>
          <button type="button" data-fill="remove" hidden>Remove this reference</button>"""
    image = f'<img alt="{escape(text)}" hidden>' if mask else ""
    kind = "dynaip-upload" if mask else "dynaip-upload dynaip-once"
    return f"""<div class="{kind}" data-value="{value}" data-largest="{largest}">
      <label>{escape(text)} <input type="file" accept="{ACCEPTED if mask else "image/png"}"></label>
      {image}{painting}<p class="dynaip-problem" role="alert"></p></div>"""


def problem(error: UserError) -> str:
    """An error in the page's own labels."""
    return f'<p class="dynaip-problem" role="alert">{escape(error.told(controls.label))}</p>'


def told(lines: Sequence[str]) -> str:
    """Lines worth showing, in the page's own labels."""
    return "".join(f"<p>{escape(UserError(line).told(controls.label))}</p>" for line in lines)


def status(now: Snapshot, lines: Sequence[str] = ()) -> str:
    """How a job stands, with a bar and the picture as far as it is."""
    if now.error is not None and now.state == FAILED:
        return problem(now.error)
    text, bar, image = dict(done="Done.", cancelled="Cancelled.").get(now.state, ""), "", ""
    if now.state == WAITING:
        text = f"Waiting: {now.ahead} before this one."
    elif now.state not in (DONE, CANCELLED):
        text = f"Step {now.step} of {now.steps}" if now.step else "Beginning (a size that is new is compiled first)"
        bar = f'<progress max="{max(now.steps, 1)}" value="{now.step}" aria-label="steps"></progress>'
        if now.shown is not None:
            image = f'<img alt="the picture as far as it is" src="{address(now.shown)}">'
    return f'<div class="dynaip-status" data-state="{now.state}"><p role="status">{text}</p>{bar}{image}{told(lines)}</div>'


def address(image: Image.Image) -> str:
    """A small picture as a data address."""
    content = io.BytesIO()
    image.copy().save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def table(rows: Sequence[tuple[str, str, str]], first: str, second: str) -> str:
    """What differs between two pictures."""
    if not rows:
        return "<p>Both have the same settings.</p>"
    head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in ("", first, second))
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
