"""The page in a browser without a window: upload, paint, draw, cancel, bad uploads, settings, reload, keyboard, a phone."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from dynaip_jax.app import serve
from dynaip_jax.app.studio import Studio
from dynaip_jax.app.turns import CANCELLED
from dynaip_jax.sampling.opening import open_model
from dynaip_jax.shapeland import default, world

BROWSER = shutil.which("chromium")
pytest.importorskip("gradio", reason="gradio is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")

DESKTOP, PHONE = dict(width=1280, height=1250), dict(width=390, height=844)
SOON = 60_000  # milliseconds, of what takes moments
playwright.expect.set_options(timeout=SOON)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    studio = Studio(open_model(*default.paths()), tmp_path_factory.mktemp("page"), most=4, largest=1 << 20)
    page, address = serve.start(studio)
    yield studio, address
    page.close(verbose=False)
    studio.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser, served):
    """An open page; at its end there were no errors in it, nothing was refused, and it asked nobody else for anything."""
    errors, asked = [], []
    context = browser.new_context(viewport=DESKTOP)
    opened = context.new_page()
    opened.set_default_timeout(SOON)
    opened.on("pageerror", lambda e: errors.append(str(e)))
    opened.on("response", lambda r: errors.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    opened.on("request", lambda r: asked.append(r.url))
    # from the start: Playwright does not wait until choosers are taken, and a key that comes before is lost (4 of 60 on busy cores)
    opened.on("filechooser", lambda _: None)
    opened.goto(served[1])
    opened.wait_for_selector("#draw")
    yield opened
    context.close()
    assert errors == []
    assert {url for url in asked if not url.startswith((served[1].rstrip("/"), "data:", "blob:"))} == set()


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """A star and a heart, seen close, as files."""
    folder = tmp_path_factory.mktemp("drawings")
    for n, kind in enumerate(("star", "heart")):
        Image.fromarray(world.drawing(kind, n)).save(folder / f"{kind}.png")
    return folder


def widget(page, name):
    return page.locator(f'.dynaip-upload[data-value="{name}"]')


def sent(page, name):
    """What a widget has put into its hidden field."""
    return page.locator(f"#{name} textarea").input_value()


def says(page, text):
    playwright.expect(page.locator("#status")).to_contain_text(text)


def draw(page):
    """Draws, and waits for the picture: what was said of the one before has to go first."""
    page.locator("#draw").click()
    page.wait_for_function("!/Done/.test(document.querySelector('#status').innerText)")
    says(page, "Done.")


def slide(page, option, value, title="Options: Picture"):
    """Types a value into the field beside a slider, whose accordion is opened first."""
    field = page.locator(f"#option-{option} input[type=number]")
    if not field.is_visible():
        page.get_by_role("button", name=title).click()
    for _ in range(10):  # what has just been opened may be set to its default once more
        field.fill(str(value))
        field.press("Tab")
        page.wait_for_timeout(300)
        if field.input_value() == str(value):
            break
    playwright.expect(field).to_have_value(str(value))


def ended(page, studio, job):
    """Waits until a job has ended before its last step, and another may begin."""
    for _ in range(100):
        if studio._turns._current is None:
            break
        page.wait_for_timeout(100)
    assert studio._turns._current is None and job.now.state == CANCELLED


@pytest.fixture
def screenshot(request):
    """Saves a picture of a page of this name, if that is asked for."""

    def save(page, name, **how):
        if folder := request.config.getoption("--screenshots"):
            page.evaluate("window.scrollTo(0, 0)")
            page.wait_for_timeout(700)
            page.screenshot(path=Path(folder) / name, **how)

    return save


def test_upload_paint_draw_compare_and_look(page, drawings, screenshot):
    reference = widget(page, "value-1")
    reference.locator("input[type=file]").set_input_files(drawings / "star.png")
    playwright.expect(reference.locator("img")).to_be_visible()
    plain = len(sent(page, "value-1"))
    reference.locator("summary").click()
    canvas = reference.locator("canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    for part in (0.35, 0.5, 0.65, 0.8):
        page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + part * box["height"])
    page.mouse.up()
    assert len(sent(page, "value-1")) > plain + 100, "the mask was sent"
    draw(page)
    playwright.expect(page.locator("#picture img")).to_be_visible()
    page.locator("#keep").click()
    playwright.expect(page.locator("#kept img")).to_be_visible()
    slide(page, "image_scale", 0.3, "Options: References")
    draw(page)
    for text in ("Image scale", "0.3"):
        playwright.expect(page.locator("#differences")).to_contain_text(text)
    page.get_by_role("button", name="Options: References").click()
    screenshot(page, "serve.png")
    page.locator("#look").click()
    playwright.expect(page.locator("#maps img")).to_be_visible(timeout=SOON)
    alts = page.evaluate("[...document.querySelectorAll('img')].filter((e) => e.checkVisibility()).map((e) => e.alt)")
    assert {"the picture drawn", "the picture kept", "where the references act", "a picture made here"} < set(alts)
    assert "" not in alts
    page.locator("#gallery button.thumbnail-item").nth(1).click()
    says(page, "Settings loaded.")
    page.get_by_role("button", name="Options: References").click()
    playwright.expect(page.locator("#option-image_scale input[type=number]")).to_have_value("1")


def test_a_bad_upload_is_told_and_the_next_is_drawn(page, drawings, tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    (tmp_path / "large.png").write_bytes(bytes(2 << 20))
    reference = widget(page, "value-1")
    reference.locator("input[type=file]").set_input_files(tmp_path / "large.png")
    playwright.expect(reference.locator(".dynaip-problem")).to_contain_text("large.png: more than 1 MiB")
    reference.locator("input[type=file]").set_input_files(tmp_path / "notes.png")
    page.locator("#draw").click()
    says(page, "Reference 1: not a picture, or a broken one")
    assert page.locator("#status [role=alert]").count() == 1
    reference.locator("input[type=file]").set_input_files(drawings / "heart.png")
    page.locator("#words-1 input, #words-1 textarea").fill("star")
    draw(page)
    reference.get_by_role("button", name="Remove this reference").click()
    assert sent(page, "value-1") == ""


def test_cancel_reload_and_settings_of_a_file(page, served, drawings):
    studio, _ = served
    slide(page, "steps", 60)
    slide(page, "num_images", 4)
    page.locator("#draw").click()
    says(page, "Step ")
    playwright.expect(page.locator("#status img")).to_be_visible()
    job = studio._turns._current
    page.locator("#cancel").click()
    says(page, "Cancelled.")
    ended(page, studio, job)
    page.locator("#draw").click()
    says(page, "Step ")
    job = studio._turns._current
    page.reload()
    page.wait_for_selector("#draw")
    ended(page, studio, job)
    prompt = page.locator("#prompt input, #prompt textarea")
    prompt.fill("a moon in the middle on snow at night")
    prompt.press("Enter")
    says(page, "Done.")
    newest = max(studio.folder.glob("*.png"), key=lambda path: path.stat().st_mtime)
    settings = widget(page, "value-settings").locator("input")
    for other in ("something else", "and again"):  # the same file, twice
        prompt.fill(other)
        with page.expect_file_chooser() as chosen:
            settings.click()
        chosen.value.set_files(newest)
        playwright.expect(prompt).to_have_value("a moon in the middle on snow at night")
    says(page, "Settings loaded.")
    settings.set_input_files(drawings / "star.png")
    says(page, "holds no settings")


# what a pointer can operate gets a number
OPERABLE = """() => {
  const names = [];
  for (const e of document.querySelectorAll("a[href], button, input, select, textarea, summary, [role=slider]")) {
    if (e.disabled || !e.checkVisibility({ visibilityProperty: true }) || !e.getBoundingClientRect().width) continue;
    e.dataset.number = names.length;
    names.push(e.closest("[id]").id + " " + e.tagName + " " + (e.type || "") + " " + e.innerText);
  }
  return names;
}"""


def tab_to(page, selector, most=150):
    """Presses the Tab key until the focus is there."""
    for _ in range(most):
        if page.evaluate("s => document.activeElement.matches(s)", selector):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab does not reach {selector}")


def test_everything_works_by_keyboard(page, drawings):
    press = page.keyboard.press
    page.locator("#prompt input, #prompt textarea").focus()
    tab_to(page, '[data-value="value-1"] input')
    with page.expect_file_chooser() as chosen:
        press("Enter")
    chosen.value.set_files(drawings / "star.png")
    playwright.expect(widget(page, "value-1").locator("img")).to_be_visible()
    plain = len(sent(page, "value-1"))
    tab_to(page, '[data-value="value-1"] summary')
    press("Enter")
    tab_to(page, '[data-value="value-1"] [data-fill=left]')
    press("Enter")
    assert len(sent(page, "value-1")) > plain + 100, "the mask was sent"
    for title in page.locator("button.label-wrap").all_inner_texts()[1:]:
        page.evaluate(
            "t => { for (const b of document.querySelectorAll('button.label-wrap')) b.dataset.here = b.innerText === t; }",
            title,
        )
        tab_to(page, "[data-here=true]")
        press("Enter")
        page.wait_for_timeout(300)
    names = page.evaluate(OPERABLE)
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(2 * len(names)):
        press("Tab")
        reached.add(page.evaluate("document.activeElement.dataset.number"))
    assert not [name for k, name in enumerate(names) if str(k) not in reached] and len(names) > 60
    tab_to(page, "#option-steps input[type=range]")
    press("ArrowRight")
    playwright.expect(page.locator("#option-steps input[type=number]")).to_have_value("17")
    tab_to(page, "#option-fit input[value=crop]")
    press("Space")
    playwright.expect(page.locator("#option-fit input[value=crop]")).to_be_checked()
    tab_to(page, "#option-granularity input")
    press("Space")
    playwright.expect(page.locator("#option-granularity input")).not_to_be_checked()
    tab_to(page, "#draw")
    press("Enter")
    says(page, "Step ")
    tab_to(page, "#cancel")
    press("Enter")
    says(page, "Cancelled.")


def test_a_phone_shows_everything_without_sideways_scrolling(page, drawings, screenshot):
    page.set_viewport_size(PHONE)
    page.reload()
    page.wait_for_selector("#draw")
    widget(page, "value-1").locator("input[type=file]").set_input_files(drawings / "star.png")
    draw(page)
    page.locator("#keep").click()
    playwright.expect(page.locator("#kept img")).to_be_visible()
    page.locator("#look").click()
    playwright.expect(page.locator("#maps img")).to_be_visible(timeout=SOON)
    screenshot(page, "serve_phone.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for control in ("#draw", "#cancel", "#keep", "#look"):
        assert page.locator(control).bounding_box()["height"] >= 36
    for picture, width in (("#picture", 130), ("#kept", 130), ("#maps", 700)):  # a wide figure scrolls in its own box
        assert page.locator(f"{picture} img").bounding_box()["width"] >= width
    small = """() => [...document.querySelectorAll("label, span, p, button, input, summary, td, th")].filter(
      (e) => e.innerText && e.getBoundingClientRect().width > 1 && parseFloat(getComputedStyle(e).fontSize) < 12).map((e) => e.innerText)"""
    assert page.evaluate(small) == []
