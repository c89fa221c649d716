import threading
import time

import numpy as np
import pytest
from PIL import Image

gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("gradio")

from gradio_client.exceptions import AppError  # noqa: E402

from localdit.config import Config  # noqa: E402
from localdit.demo.controls import Offer  # noqa: E402
from localdit.demo.page import build_page, launch  # noqa: E402
from localdit.images import read_metadata, save_image  # noqa: E402


@pytest.fixture(scope="module")
def address(artist, config, tmp_path_factory):
    """The address of a page with the tiny model."""
    folder = tmp_path_factory.mktemp("pictures")

    def save(picture, settings):
        carried = {"prompt": settings.prompt, "seed": settings.seed, "mode": settings.mode}
        return save_image(picture, folder / f"{time.monotonic_ns()}.png", carried)

    offer = Offer(config, "", ["a red circle"], {"edit": 0.8, "inpaint": 1.0}, None, 16)
    page = build_page(artist, offer, ["a tiny model"], save)
    yield launch(page, "127.0.0.1", None)
    page.close(verbose=False)


@pytest.fixture
def client(address, tmp_path):
    def connect():
        return gradio_client.Client(address, verbose=False, download_files=str(tmp_path))

    return connect


def arguments(mode="generate", image=None, painted=None, **changes):
    plain = {
        "prompt": "a red circle", "image": image, "painted": painted, "strength": 1.0,
        "negative_prompt": "", "width": 32, "height": 32, "steps": 4, "guidance_scale": 2.0,
        "seed": 3, "random_seed": False,
    }  # fmt: skip
    return [mode, *(plain | changes).values()]


def test_the_page_draws_and_the_picture_carries_its_settings(client, artist, asked):
    picture, *_ = client().predict(*arguments(seed=5), api_name="/draw")
    assert read_metadata(picture) == {"prompt": "a red circle", "seed": 5, "mode": "generate"}
    *_, same = artist.draw(asked(seed=5))
    assert np.array_equal(Image.open(picture), same)


def test_new_seeds_differ(client):
    pictures = [
        client().predict(*arguments(random_seed=True, steps=1), api_name="/draw")[0]
        for _ in range(2)
    ]
    first, second = (read_metadata(picture)["seed"] for picture in pictures)
    assert first != second


@pytest.mark.parametrize(
    "asked_for, message",
    [
        (arguments(prompt=" "), "The prompt is empty: say what the picture shows."),
        (
            arguments(height=40),
            "Height must be a positive multiple of 16 pixels, got 40; the nearest that work",
        ),
        (arguments("edit"), "There is no picture to start from"),
        (arguments("inpaint"), "There is no picture to start from"),
        (arguments(prompt="a" * 20_000), "20000 characters"),
    ],
)
def test_the_page_reports_mistakes(client, asked_for, message):
    with pytest.raises(AppError, match=message):
        client().predict(*asked_for, api_name="/draw")


def test_the_page_reports_files_that_are_not_pictures(client, tmp_path):
    file = tmp_path / "notes.png"
    file.write_text("no picture")
    with pytest.raises(AppError) as raised:
        client().predict(
            *arguments("edit", image=gradio_client.handle_file(file)), api_name="/draw"
        )
    assert "notes.png" in str(raised.value) and "/" not in str(raised.value)


def test_two_visitors_at_once_both_get_their_picture(client, artist, asked):
    jobs = [client().submit(*arguments(seed=seed), api_name="/draw") for seed in (1, 2)]
    for seed, job in zip((1, 2), jobs, strict=True):
        *_, alone = artist.draw(asked(seed=seed))
        assert np.array_equal(Image.open(job.result(timeout=60)[0]), alone)


def test_cancelling_stops_the_drawing_and_the_next_one_is_drawn(client):
    connected = client()
    job = connected.submit(*arguments(steps=100, width=64, height=64), api_name="/draw")
    while not job.outputs():
        time.sleep(0.02)
    job.cancel()
    deadline = time.monotonic() + 30
    while any(thread.name == "localdit-drawing" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert connected.predict(*arguments(), api_name="/draw")[0]


def test_the_longest_side_is_twice_the_first_one():
    offer = Offer(Config(height=768, width=1024), "", ["a"], {}, None, 32)
    assert offer.sides == (32, 2048, 32)
