import subprocess

import pytest
import torch

from benchmarks import machine
from benchmarks.worker import ROOT
from localdit.machine import device_name


def test_the_commit_is_that_of_the_repository(tmp_path):
    assert machine.commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("one")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    commit = machine.commit(tmp_path)
    assert commit is not None and len(commit) == 10
    (tmp_path / "file").write_text("two")
    assert machine.commit(tmp_path) == f"{commit} with changes"


def test_the_command_can_be_run_again():
    about = machine.circumstances("benchmarks.denoiser", ["--output", "a folder"], ROOT)
    assert about["command"] == "python -m benchmarks.denoiser --output 'a folder'"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_an_error():
    assert "--device cpu" in machine.describe("cuda")["error"]
    about = machine.describe("auto")
    assert about["device"] == "cpu"
    assert about["machine"] == device_name(torch.device("cpu"))
    assert about["versions"]["torch"] == torch.__version__
