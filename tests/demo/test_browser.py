"""The page as people use it: in a browser, with the model in the box."""

import io
import shutil
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")

from localdit.cli.demo import build_parser, make_page, page_model, scene  # noqa: E402
from localdit.cli.drawing import load  # noqa: E402
from localdit.demo.page import SKETCHED, launch  # noqa: E402
from localdit.images import read_metadata  # noqa: E402
from localdit.scenes.scene import PALETTE  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser"])), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

RED, BLUE, YELLOW = (PALETTE[name] for name in ("red", "blue", "yellow"))
YELLOW_CIRCLE = "a large yellow circle at the top left on a blue background"


@contextmanager
def serving(name, folder):
    """Serve the page of a model, as the command does, and yield its address."""
    model = page_model(build_parser().parse_args(["--model", name]))
    page = make_page(load(model), model, folder)
    yield launch(page, "127.0.0.1", None)
    page.close(verbose=False)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with serving("box", tmp_path_factory.mktemp("pictures")) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield chromium
        chromium.close()


@contextmanager
def opened(browser, address):
    """Open a page; errors in it fail the test, and so do requests to elsewhere."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    page = context.new_page()
    errors, elsewhere = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: elsewhere.append(request.url))
    page.goto(address)
    page.wait_for_selector("#draw")
    yield page
    context.close()
    assert not errors
    assert [url for url in elsewhere if not url.startswith((address, "data:", "blob:"))] == []


@pytest.fixture
def page(browser, address):
    with opened(browser, address) as page:
        yield page


def seed(page, value):
    page.get_by_label("New for each picture").uncheck()
    page.get_by_label("Seed", exact=True).fill(str(value))


def draw(page):
    """Press Draw, wait for the picture, and return it as the browser got it."""
    page.locator("#draw").click()
    page.wait_for_selector("#status .note")
    page.wait_for_selector("#status ul.settings", timeout=60_000)
    return shown(page)


def shown(page):
    source = page.locator("#picture img").get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(source).body()))


def near(colour, wanted):
    return np.abs(np.asarray(colour, float) - wanted).max() < 40


def test_a_prompt_becomes_its_picture(page):
    page.locator("#prompt textarea").fill("a large red circle in the centre on a blue background")
    seed(page, 0)
    picture = draw(page)
    assert picture.size == (256, 256)
    assert near(picture.getpixel((128, 128)), RED)
    pixels = np.asarray(picture)
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert near(np.median(edge, axis=0), BLUE)
    assert "seed 0" in page.locator("#status").inner_text()
    sync_api.expect(page.locator("#gallery img")).to_have_count(1)


@pytest.mark.slow
def test_the_downloaded_picture_carries_its_settings(page):
    seed(page, 7)
    draw(page)
    with page.expect_download() as download:
        page.locator("#picture").get_by_label("Download").click()
    carried = read_metadata(download.value.path())
    assert carried["seed"] == 7
    assert carried["prompt"] == page.locator("#prompt textarea").input_value()


@pytest.mark.slow
def test_a_picture_is_edited(page):
    page.get_by_label("Edit", exact=True).check()
    page.locator("#image img").wait_for()
    page.locator("#prompt textarea").fill(YELLOW_CIRCLE)
    seed(page, 0)
    picture = draw(page)
    assert near(picture.getpixel((64, 64)), YELLOW)
    assert near(picture.getpixel((200, 200)), BLUE)


@pytest.mark.slow
def test_painted_parts_are_redrawn_and_the_rest_is_kept(page):
    page.get_by_label("Inpaint", exact=True).check()
    paint(page, left=0.1, top=0.1, right=0.4, bottom=0.4)
    page.locator("#prompt textarea").fill(YELLOW_CIRCLE)
    seed(page, 0)
    picture = draw(page)
    before, after = np.asarray(scene()), np.asarray(picture)
    assert near(after[64, 64], YELLOW)
    assert np.array_equal(before[160:], after[160:])
    assert np.array_equal(before[:, 160:], after[:, 160:])


def paint(page, left, top, right, bottom):
    """Paint over a part of the picture in the editor; places are fractions of its sides."""
    canvas = page.locator("#editor canvas").first
    canvas.wait_for()
    page.wait_for_timeout(500)  # the picture is laid onto the canvas
    x, y, side = picture_on(canvas)
    for row in np.linspace(top, bottom, 3):
        page.mouse.move(x + left * side, y + row * side)
        page.mouse.down()
        page.mouse.move(x + right * side, y + row * side, steps=4)
        page.mouse.up()
    page.wait_for_timeout(500)  # the strokes are handed in


def picture_on(canvas):
    """The corner and the side of the square picture on the page, found from its pixels."""
    box = canvas.bounding_box()
    pixels = np.asarray(Image.open(io.BytesIO(canvas.screenshot())).convert("RGB"), float)
    blue = np.abs(pixels - BLUE).max(-1) < 25
    columns, rows = np.flatnonzero(blue.any(0)), np.flatnonzero(blue.any(1))
    return box["x"] + columns[0], box["y"] + rows[0], columns[-1] - columns[0]


@pytest.mark.slow
def test_stop_ends_the_drawing_and_the_session_goes_on(page):
    page.get_by_label("number input for Steps").fill("100")
    page.locator("#draw").click()
    page.wait_for_selector("#status .bar")
    page.locator("#stop").click()
    page.get_by_text("Stopped.").wait_for()
    deadline = time.monotonic() + 10
    while any(thread.name == "localdit-drawing" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        page.wait_for_timeout(20)
    assert page.locator("#gallery img").count() == 0
    assert page.locator("#stop").is_hidden()
    page.get_by_label("number input for Steps").fill("4")
    assert draw(page).size == (256, 256)


@pytest.mark.slow
def test_leaving_the_page_ends_its_drawing(page):
    page.get_by_label("number input for Steps").fill("100")
    page.locator("#draw").click()
    page.wait_for_selector("#status .bar")
    page.goto("about:blank")
    deadline = time.monotonic() + 30
    while any(thread.name == "localdit-drawing" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        page.wait_for_timeout(20)
    page.go_back()


@pytest.mark.slow
def test_the_page_reports_mistakes_and_draws_the_next_picture(page):
    page.locator("#prompt textarea").fill("")
    page.locator("#draw").click()
    told = "The prompt is empty: describe the picture."
    sync_api.expect(page.locator("#status .problem")).to_have_text(told)
    page.locator("#prompt textarea").fill("a small green cross on white")
    assert draw(page).size == (256, 256)


@pytest.mark.slow
def test_the_gallery_shows_earlier_pictures_with_their_settings_to_use_again(page):
    seed(page, 1)
    first = draw(page)
    page.locator("#prompt textarea").fill("a small green cross on a white background")
    seed(page, 2)
    page.locator("#draw").click()
    page.get_by_text("seed 2").wait_for()
    page.locator("#gallery button.thumbnail-item").nth(1).click()
    page.get_by_text("seed 1").wait_for()
    assert np.array_equal(shown(page), first)
    page.get_by_role("button", name="Use its settings").click()
    page.wait_for_timeout(500)
    assert page.get_by_label("Seed", exact=True).input_value() == "1"
    assert "red circle" in page.locator("#prompt textarea").input_value()
    page.get_by_role("button", name="Edit this").click()
    page.locator("#image img").wait_for()
    assert page.get_by_label("Edit", exact=True).is_checked()


@pytest.mark.slow
def test_a_quick_model_draws_while_one_types(browser, tmp_path):
    with serving("box-few-steps", tmp_path) as address, opened(browser, address) as page:
        page.locator("#prompt textarea").fill("")
        page.locator("#prompt textarea").press_sequentially(YELLOW_CIRCLE, delay=30)
        page.locator("#picture img").wait_for(timeout=60_000)
        page.get_by_text(SKETCHED).wait_for()
        page.wait_for_timeout(5000)  # the last letters are drawn
        sketch = np.asarray(shown(page))
        assert near(sketch[32, 32], YELLOW) and near(sketch[100, 100], BLUE)
        assert page.locator("#gallery img").count() == 0
        assert page.get_by_role("button", name="Edit this").is_disabled()
        assert np.array_equal(draw(page), sketch)
        page.locator("#gallery img").wait_for()


@pytest.mark.slow
def test_a_slow_model_waits_for_the_button(page):
    assert page.get_by_label("Draw while typing").count() == 0
    page.locator("#prompt textarea").fill(YELLOW_CIRCLE)
    page.wait_for_timeout(3000)
    assert page.locator("#picture img").count() == 0
