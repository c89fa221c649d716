import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from localdit.cli import demo, main
from localdit.cli.demo import FIRST_PORT, free_port
from localdit.images import read_metadata
from localdit.pipelines import LocalDiTPipeline
from localdit.utils import model_in_the_box
from tests.demo.conftest import artist, asked, config  # noqa: F401

ROOT = Path(__file__).parents[2]


def test_help_names_what_the_page_needs(capsys):
    assert main(["demo", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--host", "--port", "--output", "--model", "--device", "--dtype", "--debug"):
        assert option in shown


def test_by_default_only_this_machine_can_open_the_page():
    assert demo.build_parser().parse_args([]).host == "127.0.0.1"


def test_without_gradio_the_error_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert 'error: the page needs Gradio: pip install "localdit[demo]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "nowhere"], "--model: there is no nowhere"),
        (["--device", "abacus"], "--device is 'abacus'"),
        (["--host", "192.0.2.1"], "can't listen on --host 192.0.2.1"),
        (["--output", "{file}"], "can't write to the output folder"),
    ],
)
def test_mistakes_give_one_line_and_nothing_is_loaded(
    monkeypatch, capsys, tmp_path, arguments, message
):
    pytest.importorskip("gradio")
    monkeypatch.setattr(demo, "load", lambda model: pytest.fail("the model was loaded"))
    file = tmp_path / "file"
    file.touch()
    assert main(["demo", *(word.format(file=file) for word in arguments)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("localdit demo: error: ") and message in error


def test_a_busy_port_is_a_mistake(monkeypatch, capsys):
    pytest.importorskip("gradio")
    monkeypatch.setattr(demo, "load", lambda model: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as busy:
        assert main(["demo", "--port", str(busy.getsockname()[1])]) == 2
    assert "is taken; give another --port" in capsys.readouterr().err


def test_saved_pictures_carry_the_settings_of_the_command_line(artist, asked, tmp_path):  # noqa: F811
    folder, keep = tmp_path / "page", tmp_path / "kept"
    keep.mkdir()
    model = demo.page_model(demo.build_parser().parse_args(["--model", "box"]))
    save = demo.saving(artist.pipe, model, folder, keep)
    picture = Image.new("RGB", (32, 32))
    paths = [save(picture, asked("edit", strength=0.5, seed=9)) for _ in range(2)]
    assert paths == [folder / "edit_000.png", folder / "edit_001.png"]
    carried = read_metadata(keep / "edit_001.png")
    assert carried == read_metadata(paths[1])
    assert (
        carried["seed"] == 9 and carried["strength"] == 0.5 and carried["num_inference_steps"] == 4
    )
    assert carried["model"] == "the model in the box" and carried["mode"] == "edit"


def test_the_page_starts_at_the_settings_of_the_folder(model, tmp_path):
    few = tmp_path / "few"
    tiny = LocalDiTPipeline.from_pretrained(model, num_inference_steps=4, guidance_scale=1.0)
    tiny.save_pretrained(few)
    for folder, settings in (
        (few, (4, 1.0)),
        ("box", (20, 2.0)),
        ("box-few-steps", (4, 1.0)),
        (model, (20, 7.0)),
    ):
        first = demo.page_model(demo.build_parser().parse_args(["--model", str(folder)])).config
        assert (first.denoising_steps, first.guidance_scale) == settings


@pytest.mark.parametrize(("lora", "student"), [(None, True), ("user/lora", False)])
def test_without_weights_the_page_draws_with_the_student(
    tmp_path, monkeypatch, capsys, lora, student
):
    monkeypatch.chdir(tmp_path)
    model = demo.page_model(demo.build_parser().parse_args(["--lora", lora] if lora else []))
    assert model.checkpoint == model_in_the_box(few_steps=student)
    demo.report_fallback(model)
    assert ("using the student of the small model" in capsys.readouterr().err) == student


@pytest.mark.slow
def test_the_command_serves_the_page_until_it_is_interrupted():
    pytest.importorskip("gradio")
    gradio_client = pytest.importorskip("gradio_client")
    process = subprocess.Popen(
        [sys.executable, "-m", "localdit", "demo", "--model", "box"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    address = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
    with urllib.request.urlopen(address) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert b"LocalDiT" in answer.read()
    long = {"width": 256, "height": 256, "steps": 100}
    drawing = gradio_client.Client(address, verbose=False).submit(**long, api_name="/draw")
    while not drawing.outputs():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)  # in the middle of a drawing
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


# Ports


def test_a_free_port_is_used():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert free_port("127.0.0.1", port) == port


def test_the_error_about_a_busy_port_says_what_to_do():
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} is taken; give another --port, or leave"):
            free_port("127.0.0.1", port)


def test_without_a_port_the_first_free_one_is_used():
    first = free_port("127.0.0.1", None)
    assert first >= FIRST_PORT
    with socket.create_server(("127.0.0.1", first)):
        assert free_port("127.0.0.1", None) > first


@pytest.mark.parametrize("host", ["192.0.2.1", "nowhere.invalid", "1.2.3"])
def test_hosts_that_are_not_this_machine_are_refused(host):
    with pytest.raises(OSError, match=f"--host .*{host}"):
        free_port(host, None)
