import threading

import numpy as np
import pytest
from PIL import Image

from localdit.demo.artist import Step
from localdit.inference import inference

RED = Image.new("RGB", (32, 32), "red")


def mask_of(box, size=(32, 32)):
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def drawn(artist, settings, *pictures):
    *steps, picture = artist.draw(settings, *pictures)
    return steps, picture


def workers():
    return [thread for thread in threading.enumerate() if thread.name == "localdit-drawing"]


@pytest.fixture
def calls(artist, monkeypatch):
    """How many calls of the transformer are at work at each call's begin."""
    at_work, counts = [], []
    forward = artist.pipe.transformer.forward

    def counting(*args, **kwargs):
        at_work.append(None)
        counts.append(len(at_work))
        try:
            return forward(*args, **kwargs)
        finally:
            at_work.pop()

    monkeypatch.setattr(artist.pipe.transformer, "forward", counting)
    return counts


def test_steps_come_with_previews_and_then_the_picture(artist, asked):
    steps, picture = drawn(artist, asked())
    assert [(step.number, step.total) for step in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert steps[0].preview.size == (32, 32)
    assert picture.size == (32, 32)


@pytest.mark.parametrize("mode", ["generate", "edit", "inpaint"])
def test_pictures_are_those_of_the_command_line(artist, asked, mode):
    settings = asked(mode, strength=0.75)
    image = None if mode == "generate" else RED
    mask = mask_of((0, 0, 16, 32)) if mode == "inpaint" else None
    _, picture = drawn(artist, settings, image, mask)
    config = settings.configure(artist.config)
    again = inference(
        artist.pipe, settings.prompt, "", config, image, mask=mask, seed=settings.seed
    )
    assert np.array_equal(picture, again[0])


def test_editing_takes_the_steps_of_its_strength(artist, asked):
    steps, _ = drawn(artist, asked("edit", strength=0.5), RED)
    assert len(steps) == 2


def test_what_is_not_marked_stays_to_the_pixel(artist, asked):
    _, picture = drawn(artist, asked("inpaint"), RED, mask_of((0, 0, 16, 16)))
    pixels = np.asarray(picture)
    assert (pixels[16:] == (255, 0, 0)).all()
    assert not (pixels[:16, :16] == (255, 0, 0)).all()


def test_an_inpainted_picture_keeps_its_size(artist, asked):
    image = Image.new("RGB", (96, 64), "red")
    _, picture = drawn(artist, asked("inpaint"), image, mask_of((8, 8, 24, 24), image.size))
    assert picture.size == image.size
    assert picture.getpixel((90, 60)) == (255, 0, 0)


def test_closing_stops_the_drawing_after_the_step_at_hand(artist, asked, calls):
    drawing = artist.draw(asked(num_inference_steps=100))
    assert next(drawing).number == 1
    drawing.close()
    assert len(calls) < 100
    assert not workers()
    assert artist.pipe.interrupt
    assert drawn(artist, asked())[1].size == (32, 32)  # and the next one is drawn


def test_one_picture_is_drawn_at_a_time(artist, asked, calls):
    alone = [np.asarray(drawn(artist, asked(seed=seed))[1]) for seed in range(3)]
    together = [None] * 3

    def draw(seed):
        together[seed] = np.asarray(drawn(artist, asked(seed=seed))[1])

    threads = [threading.Thread(target=draw, args=[seed]) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(calls) == 1
    assert all(np.array_equal(*pair) for pair in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    "mode, image, mask, message",
    [
        ("edit", None, None, "There is no picture to start from"),
        ("inpaint", None, mask_of((0, 0, 8, 8)), "There is no picture to start from"),
        ("inpaint", RED, None, "Nothing is marked"),
        ("inpaint", RED, mask_of((0, 0, 0, 0)), "Nothing is marked"),
    ],
)
def test_missing_pictures_are_told_before_anything_is_computed(
    artist, asked, calls, mode, image, mask, message
):
    with pytest.raises(ValueError, match=message):
        next(artist.draw(asked(mode), image, mask))
    assert not calls


def test_failures_reach_who_asked(artist, asked, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(artist.pipe.transformer, "forward", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(artist.draw(asked()))
    assert not workers()
    monkeypatch.undo()
    assert isinstance(next(artist.draw(asked())), Step)
