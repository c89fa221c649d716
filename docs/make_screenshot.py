"""Take a screenshot of `localdit demo` as images/demo.png: `python docs/make_screenshot.py`.

Needs Playwright's Python package and Debian's chromium.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from localdit.cli.demo import build_parser, make_page, page_model
from localdit.cli.drawing import load
from localdit.demo.page import launch

IMAGE = Path(__file__).with_name("images") / "demo.png"
PROMPTS = [
    "a small white cross in the centre of a purple background",
    "a large yellow sun above a small white boat on a gradient from blue to turquoise",
    "a large yellow sun above a small red house and a small orange tree "
    "on green ground under a blue sky",
]


def main() -> None:
    """Serve the page, generate three images in it, and take a screenshot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", nargs="?", type=Path, default=IMAGE, help="PNG to write")
    parser.add_argument("--width", type=int, default=1200, help="width of the window in pixels")
    parser.add_argument("--dark", action="store_true", help="use dark mode")
    parser.add_argument("--inpaint", action="store_true", help="show the inpainting editor")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        model = page_model(build_parser().parse_args(["--model", "box-few-steps"]))
        page = make_page(load(model), model, Path(name))
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        window = chromium.new_page(
            viewport={"width": args.width, "height": 900},
            color_scheme="dark" if args.dark else "light",
        )
        window.goto(launch(page, "127.0.0.1", None))
        for seed, prompt in enumerate(PROMPTS):
            _draw(window, prompt, seed)
        if args.inpaint:
            window.get_by_role("button", name="Inpaint this").click()
        window.wait_for_timeout(2000)
        window.screenshot(path=args.output, full_page=True)
        chromium.close()
        page.close(verbose=False)


def _draw(window: Page, prompt: str, seed: int) -> None:
    window.get_by_label("New for each picture").uncheck()
    window.get_by_label("Seed", exact=True).fill(str(seed))
    window.locator("#prompt textarea").fill(prompt)
    window.locator("#draw").click()
    window.get_by_text(f"seed {seed}", exact=True).wait_for()


if __name__ == "__main__":
    main()
