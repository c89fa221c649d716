"""What would be published: its contents, and that it works where only it is installed."""

import email
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests/typed_program.py"
TORCH = "torch==2.13.0"
ENVIRONMENT = {name: os.environ[name] for name in os.environ if name != "PYTHONPATH"}
SETTINGS = """[mypy]
[mypy-torch.*,diffusers.*,transformers.*,accelerate.*,numpy.*,huggingface_hub.*,safetensors.*]
follow_imports = skip
"""
DRAWS = """
import torch
from localdit import LocalDiTImg2ImgPipeline, LocalDiTInpaintPipeline, LocalDiTPipeline
from localdit import model_in_the_box
from PIL import Image

pipe = LocalDiTPipeline.from_pretrained(model_in_the_box())
image = pipe("a red circle", num_inference_steps=2).images[0]
edit = LocalDiTImg2ImgPipeline.from_pipe(pipe)
image = edit("a red circle", image, num_inference_steps=2).images[0]
inpaint = LocalDiTInpaintPipeline.from_pipe(pipe)
image = inpaint("a red circle", image, Image.new("L", image.size, 255), num_inference_steps=2)
assert image.images[0].size == (256, 256)
"""


def run(*command, **options):
    """A command's standard output; the test fails with all it said if the command does."""
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        **{"env": ENVIRONMENT, **options},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tracked():
    """The project's files; tests of contents compare with them."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("no checkout of git")
    return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tracked, tmp_path_factory):
    """The folder with the sdist, and the wheel that is built from it."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The `bin` of an environment with the wheel, and the libraries of this one."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel
    )
    library = next(folder.glob("lib/python*/site-packages"))
    shared = [path for path in sys.path if path.endswith("-packages")]
    (library / "shared.pth").write_text("\n".join(shared))
    return folder / "bin"


def test_twine_accepts_both(built):
    said = run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir())
    assert said.count("PASSED") == 2


def test_the_wheel_holds_the_package_and_nothing_else(wheel, tracked):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {name for name in tracked if name.startswith("localdit/")}
    assert "localdit/py.typed" in names
    assert "localdit/box/transformer/diffusion_pytorch_model.safetensors" in names


def test_the_sdist_holds_the_project_and_nothing_else(built, tracked):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        files = [member.name for member in archive.getmembers() if member.isfile()]
    names = {name.split("/", 1)[1] for name in files}
    made = {name for name in names if name.split("/")[0] in ("PKG-INFO", "localdit.egg-info")}
    hidden = {name for name in tracked if name.startswith(".")}
    assert names - made - {"setup.cfg"} == tracked - hidden


def test_the_metadata_is_complete(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
        entries = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    for field in ("Name", "Version", "Summary", "Author", "License-File", "Requires-Python"):
        assert metadata[field], field
    assert "localdit = localdit.cli:main" in entries
    assert {"train", "docs", "dev"} <= set(metadata.get_all("Provides-Extra"))
    assert "Typing :: Typed" in metadata.get_all("Classifier")


def test_where_only_the_wheel_is_it_is_imported_and_the_command_answers(installed, tmp_path):
    where = run(
        installed / "python", "-c", "import localdit; print(localdit.__file__)", cwd=tmp_path
    )
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert "generate" in run(installed / "localdit", "--help", cwd=tmp_path)
    assert "PROMPT" in run(installed / "localdit", "generate", "--help", cwd=tmp_path)


@pytest.mark.slow
def test_where_only_the_wheel_is_it_draws(installed, tmp_path):
    run(installed / "python", "-c", DRAWS, cwd=tmp_path)
    command = ["generate", "a red circle", "--steps", "2", "-o", "picture.png"]
    run(installed / "localdit", *command, cwd=tmp_path)
    assert (tmp_path / "picture.png").is_file()
    run(installed / "python", PROGRAM, cwd=tmp_path)
    assert (tmp_path / "grid.png").is_file()


@pytest.mark.slow
def test_the_types_of_the_wheel_are_those_of_a_program(installed, tmp_path):
    """Of the libraries only ours is looked into: the others are not what is checked."""
    (tmp_path / "mypy.ini").write_text(SETTINGS, "utf-8")
    check = [sys.executable, "-m", "mypy", "--strict", "--python-executable", installed / "python"]
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.read_text("utf-8"), "utf-8")
    run(*check, program, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("RELEASE_CHECK"), reason="gigabytes: make release-check")
def test_into_a_fresh_environment_with_its_own_libraries(wheel, tmp_path):
    with tempfile.TemporaryDirectory() as folder:  # pytest would keep the gigabytes
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin/python"
        run(python, "-m", "pip", "install", "--quiet", TORCH)
        run(python, "-m", "pip", "install", "--quiet", wheel)
        run(python, "-m", "pip", "check")
        run(python, "-c", DRAWS, cwd=tmp_path)
        command = [Path(folder) / "bin/localdit", "generate", "a red circle", "-o", "picture.png"]
        run(*command, cwd=tmp_path)
    assert (tmp_path / "picture.png").is_file()
