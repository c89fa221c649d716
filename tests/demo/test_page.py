import io
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image, ImageFile

gradio_client = pytest.importorskip("gradio_client")
gradio = pytest.importorskip("gradio")

from gradio_client.exceptions import AppError  # noqa: E402

from localdit.config import Config  # noqa: E402
from localdit.demo import controls  # noqa: E402
from localdit.demo.controls import Offer  # noqa: E402
from localdit.demo.page import SKETCHED, Desk, build_page, launch  # noqa: E402
from localdit.images import read_metadata, save_image  # noqa: E402
from localdit.pipelines import LocalDiTPipeline  # noqa: E402
from tests.tiny import tiny_components  # noqa: E402


@pytest.fixture(scope="module")
def address(artist, config, tmp_path_factory):
    """The address of a page with the tiny model."""
    folder = tmp_path_factory.mktemp("pictures")

    def save(picture, settings):
        carried = {"prompt": settings.prompt, "seed": settings.seed, "mode": settings.mode}
        return save_image(picture, folder / f"{time.monotonic_ns()}.png", carried)

    offer = Offer(
        config, ["a red circle"], {"edit": 0.8, "inpaint": 1.0}, None, 16, ["euler", "ddim"]
    )
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
        "seed": 3, "random_seed": False, "sampler": "",
    }  # fmt: skip
    return [mode, *(plain | changes).values()]


def test_the_page_draws_and_the_picture_carries_its_settings(client, artist, asked):
    picture, *_ = client().predict(*arguments(seed=5), api_name="/draw")
    assert read_metadata(picture) == {"prompt": "a red circle", "seed": 5, "mode": "generate"}
    *_, same = artist.draw(asked(seed=5))
    assert np.array_equal(Image.open(picture), same)


def test_the_page_draws_with_the_chosen_sampler(client, artist, asked):
    pixels = []
    for name in ("", "euler"):
        picture, *_ = client().predict(*arguments(sampler=name), api_name="/draw")
        *_, same = artist.draw(asked(sampler=name))
        assert np.array_equal(Image.open(picture), same)
        pixels.append(np.asarray(same))
    assert not np.array_equal(*pixels)
    with pytest.raises(AppError, match="Sampler is 'heun'; expected one of the listed values"):
        client().predict(*arguments(sampler="heun"), api_name="/draw")


def test_the_page_tells_of_what_the_tokenizer_does_not_know(client):
    *_, status, _, _ = client().predict(*arguments(prompt="熊 <b>"), api_name="/draw")[:4]
    assert "does not know" in status and "熊" in status and "<b>" not in status
    status = client().predict(*arguments(), api_name="/draw")[1]
    assert "does not know" not in status


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
        (arguments(prompt=" "), "The prompt is empty: describe the picture."),
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


# What is not to be trusted

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\nshowpage\n%%EOF\n"


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


BOMB = png(Image.new("1", (12000, 12000)))
LAYER = Image.new("RGBA", (32, 32))
LAYER.paste("red", (0, 0, 16, 32))
GOOD = png(Image.new("RGB", (32, 32), "blue"))


class Visitor:
    """A program that sends what no browser would."""

    def __init__(self, address, session="a"):
        self.address, self.session = f"{address}/gradio_api", session
        config = httpx.get(f"{address}/config").json()
        ids = {c["props"].get("elem_id"): c["id"] for c in config["components"]}
        self.editor = ids["editor"]
        targets = {
            (name, event): dependency["id"]
            for dependency in config["dependencies"]
            for at, event in dependency["targets"]
            for name, id in ids.items()
            if id == at and name
        }
        self.switch = targets["mode", "input"]

    def upload(self, data, name="picture.png"):
        sent = httpx.post(f"{self.address}/upload", files={"files": (name, data)})
        return {"path": sent.json()[0], "meta": {"_type": "gradio.FileData"}, "orig_name": name}

    def part(self, data, kind, index="null", id="p"):
        fields = {"type": kind, "index": index, "id": id, "component_id": str(self.editor)}
        fields |= {"session_hash": self.session, "fn_name": "accept_blobs"}
        return httpx.post(
            f"{self.address}/component_server", data=fields, files={"file": ("blob", data)}
        )

    def change_mode(self):
        body = {"data": ["inpaint"], "fn_index": self.switch, "session_hash": self.session}
        assert httpx.post(f"{self.address}/run/predict", json=body).status_code == 200

    def draw(self, *asked_for, **replaced):
        data = json.dumps({"data": arguments(*asked_for, **replaced), "session_hash": self.session})
        call, json_ = f"{self.address}/call/draw", {"content-type": "application/json"}
        started = httpx.post(call, content=data.replace(PATTERN, SURROGATE), headers=json_)
        answer = httpx.get(f"{call}/{started.json()['event_id']}", timeout=60)
        kind, data = answer.text.strip().split("\n\n")[-1].split("\n")
        return kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    def refusal(self, *asked_for, **replaced):
        kind, answer = self.draw(*asked_for, **replaced)
        assert kind == "error"
        assert answer["error"], "an error without a word"
        assert str(Path(__file__).anchor) not in answer["error"].replace("/gradio_api/info", "")
        return answer["error"]


PATTERN, SURROGATE = "a lone surrogate", "\\ud800"


@pytest.fixture
def visitor(address):
    return Visitor(address)


def editor(background, *layers):
    return {"background": background, "layers": layers, "composite": background}


@pytest.fixture
def started(tmp_path, monkeypatch):
    """The file that exists once GhostScript was started."""
    ran, program = tmp_path / "ran", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho > {ran}\n[ "$1" = --version ] && echo 10.0\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return ran


WAYS = ["image", "background", "layer", "blob", "blob layer"]


def send(visitor, way, data):
    """Send a picture in one of the ways in, and return the error."""
    if way == "image":
        return visitor.refusal("edit", visitor.upload(data))
    if way.startswith("blob"):
        visitor.part(GOOD if way == "blob layer" else data, "background")
        visitor.part(data if way == "blob layer" else png(LAYER), "layer", "0")
        return visitor.refusal("inpaint", painted={"id": "p"})
    parts = [visitor.upload(GOOD), visitor.upload(data)]
    background, layer = parts if way == "layer" else reversed(parts)
    return visitor.refusal("inpaint", painted=editor(background, layer))


@pytest.mark.parametrize("switched", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_uploads_start_no_other_program(visitor, started, way, switched):
    if switched:  # Gradio then makes new components for this visitor
        visitor.session = f"{way} switched"
        visitor.change_mode()
    assert "is not an image of the kinds BMP, GIF" in send(visitor, way, POSTSCRIPT)
    assert not started.exists()


@pytest.mark.parametrize("way", WAYS)
def test_bombs_are_refused_by_their_header(visitor, monkeypatch, way):
    load = ImageFile.ImageFile.load

    def small(self):
        assert self.width * self.height < 10**6, "decoded"
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", small)
    assert "too large; at most 64 million pixels are read" in send(visitor, way, BOMB)


def test_a_painting_that_is_sent_ahead_is_drawn_once(visitor, artist, asked):
    for kind, data, index in [("background", GOOD, "null"), ("layer", png(LAYER), "0")]:
        assert visitor.part(data, kind, index).status_code == 200
    kind, answer = visitor.draw("inpaint", painted={"id": "p"})
    assert kind == "complete"
    *_, expected = artist.draw(
        asked("inpaint"), Image.open(io.BytesIO(GOOD)), LAYER.getchannel("A")
    )
    drawn = httpx.get(answer[0]["url"]).content
    assert np.array_equal(Image.open(io.BytesIO(drawn)), expected)
    assert "There is no picture" in visitor.refusal("inpaint", painted={"id": "p"})


@pytest.mark.parametrize(
    "ours, of_gradio",
    [("Picture", "Image"), ("Painting", "ImageEditor"), ("Buttons", "Radio"), ("Text", "Textbox"),
     ("Selection", "Dropdown"), ("Slider", "Slider"), ("Number", "Number"), ("Switch", "Checkbox")],
)  # fmt: skip
def test_browsers_see_the_components_of_gradio(ours, of_gradio):
    seen = []
    for component in (getattr(controls, ours), getattr(gradio, of_gradio)):
        with gradio.Blocks() as page:
            id = component()._id
        (config,) = [c for c in page.config["components"] if c["id"] == id]
        seen.append(config | {"id": None})
        assert config["type"] == of_gradio.lower()
    assert seen[0] == seen[1]


def test_an_editor_keeps_few_parts(visitor):
    assert visitor.part(GOOD, "layer", str(10**12)).status_code == 400
    assert visitor.part(GOOD, "layer", "-1").status_code == 400
    for i in range(140):
        assert visitor.part(GOOD, "background", id=str(i)).status_code == 200
    assert "There is no picture" in visitor.refusal("inpaint", painted={"id": "0"})
    assert "Nothing is marked" in visitor.refusal("inpaint", painted={"id": "139"})
    layers = [visitor.upload(png(LAYER))] * 17
    refusal = visitor.refusal("inpaint", painted=editor(visitor.upload(GOOD), *layers))
    assert "17 layers; at most 16" in refusal


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}])
def test_only_uploads_are_read(visitor, tmp_path, meta):
    (tmp_path / "secret.png").write_bytes(GOOD)
    for path in (str(tmp_path / "secret.png"), "http://127.0.0.1:1/x.png", "../x.png", "\0"):
        file = {"path": path, **meta}
        for asked_for in (("edit", file), ("inpaint", None, editor(file, file))):
            assert "upload pictures to this page first" in visitor.refusal(*asked_for)


ODD = [None, True, 7, -1, 2.5, 10**30, float("nan"), "abc", "", [], [[1]], {}, {"a": 1}]
ODD += [PATTERN, {"path": "/x"}, {"path": 3}, {"id": "x"}, {"background": 1, "layers": "x"}]


@pytest.mark.parametrize(
    "name", ["prompt", "image", "painted", "strength", "negative_prompt", "width", "height",
             "steps", "guidance_scale", "seed", "random_seed", "sampler"],
)  # fmt: skip
def test_odd_values_are_drawn_or_refused_with_a_sentence(visitor, name, caplog):
    mode = {"image": "edit", "painted": "inpaint"}.get(name, "generate")
    for odd in ODD:
        kind, answer = visitor.draw(mode, **{name: odd})
        if kind == "error":
            assert len(answer["error"] or "") > 20, odd
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_odd_values_are_named_by_their_labels(visitor):
    for name, odd, message in [
        ("prompt", None, "The prompt is empty"),
        ("prompt", ["a"], "Prompt is ['a']; expected text."),
        ("steps", "many", "Steps is 'many'; expected a number from 1 to 100."),
        ("steps", 2.5, "Steps is 2.5; expected a number from 1 to 100."),
        ("width", 1000, "Width is 1000; expected a number from 16 to 64."),
        ("strength", float("nan"), "Strength is nan; expected a number from 0 to 1."),
        ("seed", "x" * 99, f"Seed is '{'x' * 59} …; expected a whole number from 0 to"),
        ("random_seed", 1, "New for each picture is 1; expected true or false."),
    ]:
        assert visitor.refusal(**{name: odd}).startswith(message)
    refusal = visitor.refusal("paint")
    assert refusal == "Mode is 'paint'; expected one of generate, edit, inpaint."


def test_errors_of_the_server_have_no_paths(visitor, artist, monkeypatch):
    def fails(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "/srv/secret/picture.png")

    monkeypatch.setattr(artist.pipe.transformer, "forward", fails)
    assert visitor.refusal() == "The server failed: Permission denied. See its terminal."


def test_addresses_that_the_page_does_not_need_are_closed(address):
    for closed in ("file=http://example.com/", "proxy=http://example.com/"):
        assert httpx.get(f"{address}/gradio_api/{closed}").status_code == 404
    assert httpx.post(f"{address}/gradio_api/process_recording").status_code == 404
    assert httpx.get(f"{address}/gradio_api/file={__file__}").status_code == 403


def test_long_requests_are_refused(address, monkeypatch):
    monkeypatch.setattr("localdit.demo.page.MOST_BYTES", 10_000)
    body = json.dumps({"data": arguments(prompt="a" * 20_000)})
    sent = httpx.post(
        f"{address}/gradio_api/call/draw",
        content=body,
        headers={"content-type": "application/json"},
    )
    assert sent.status_code == 413


def test_twenty_visitors_at_once_all_get_their_picture(address, artist, asked):
    def visit(seed):
        visitor = Visitor(address, f"visitor {seed}")
        if seed % 2:
            return visitor.draw(seed=seed)
        visitor.part(GOOD, "background", id=visitor.session)
        visitor.part(png(LAYER), "layer", "0", id=visitor.session)
        return visitor.draw("inpaint", painted={"id": visitor.session}, seed=seed)

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(visit, range(20)))
    blue = Image.open(io.BytesIO(GOOD))
    for seed, (kind, answer) in enumerate(answers):
        assert kind == "complete", answer
        inputs = ("generate",) if seed % 2 else ("inpaint", blue, LAYER.getchannel("A"))
        *_, alone = artist.draw(asked(inputs[0], seed=seed), *inputs[1:])
        drawn = Image.open(io.BytesIO(httpx.get(answer[0]["url"]).content))
        assert np.array_equal(drawn, alone)


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


def test_the_sliders_start_at_the_settings_and_reach_them():
    config = Config(denoising_steps=200, guidance_scale=0.0)
    offer = Offer(config, ["a red circle"], {"edit": 0.8}, None, 16)
    with gradio.Blocks():
        page = controls.Controls(offer)
    steps, guidance = page.num_inference_steps, page.guidance_scale
    assert (steps.minimum, steps.value, steps.maximum) == (1, 200, 200)
    assert (guidance.minimum, guidance.value, guidance.maximum) == (0, 0, 15)


def test_the_longest_side_is_twice_the_first_one():
    offer = Offer(Config(height=768, width=1024), ["a"], {}, None, 32)
    assert offer.sides == (32, 2048, 32)


@pytest.mark.parametrize(
    "steps, guidance_scale, quick",
    [(4, 1.0, True), (2, 3.0, True), (4, 3.0, False), (5, 1.0, False)],
)
def test_only_a_quick_model_draws_while_one_types(steps, guidance_scale, quick):
    config = Config(denoising_steps=steps, guidance_scale=guidance_scale)
    with gradio.Blocks():
        page = controls.Controls(Offer(config, ["a red circle"], {"edit": 0.8}, None, 16))
    assert page.while_typing.value == page.while_typing.visible == quick
    assert page.random_seed.value != quick  # or each letter would bring another picture


@pytest.fixture
def desk(artist, config):
    offer = Offer(config, ["a red circle"], {"edit": 0.8}, None, 16)
    with gradio.Blocks():
        return Desk(artist, offer, controls.Controls(offer), save=None)


def typed(prompt, while_typing=True, mode="generate", **changes):
    plain = {
        "negative_prompt": "", "width": 32, "height": 32, "steps": 4, "guidance_scale": 2.0,
        "seed": 3, "sampler": "",
    }  # fmt: skip
    return [while_typing, mode, prompt, *(plain | changes).values()]


def test_what_is_typed_is_drawn_as_the_button_draws_it_and_not_kept(desk, artist, asked):
    page = desk.controls
    updates = desk.sketch(*typed("a red circle"))
    *_, same = artist.draw(asked())
    assert np.array_equal(updates[page.picture], same)
    assert SKETCHED in updates[page.status]
    # Nothing can be done with a picture that is not kept.
    assert updates[page.shown] is None and page.history not in updates
    assert not any(updates[one]["interactive"] for one in (page.edit, page.inpaint, page.reuse))


def test_unknown_words_are_named_while_one_types(desk):
    assert "熊" in desk.sketch(*typed("熊"))[desk.controls.status]


def test_a_model_of_whole_words_names_those_that_it_ignores(desk, monkeypatch):
    pipe = LocalDiTPipeline(**tiny_components(), whole_words=True)
    monkeypatch.setattr(desk.artist, "pipe", pipe)
    status = desk.sketch(*typed("a shiny red dodecahedron"))[desk.controls.status]
    assert "does not know these words and ignores them: shiny, dodecahedron" in status


def test_a_negative_prompt_without_guidance_gives_a_warning(desk):
    status = desk.sketch(*typed("a red circle", negative_prompt="blue", guidance_scale=1.0))
    assert "The negative prompt has no effect" in status[desk.controls.status]


@pytest.mark.parametrize(
    "values", [typed(" "), typed("a circle", while_typing=False), typed("a circle", mode="edit")]
)
def test_typing_changes_nothing_otherwise(desk, values):
    assert desk.sketch(*values) == {}


def test_mistakes_are_told_while_one_types(desk):
    with pytest.raises(gradio.Error, match="Height must be a positive multiple of 16"):
        desk.sketch(*typed("a circle", height=40))
