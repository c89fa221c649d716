import subprocess

import pytest
import torch

from benchmarks import provenance
from benchmarks.worker import ROOT
from localdit.machine import device_name


def test_the_commit_is_the_repositorys_and_says_if_files_changed(tmp_path):
    assert provenance.commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("one")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    commit = provenance.commit(tmp_path)
    assert commit is not None and len(commit) == 10
    (tmp_path / "file").write_text("two")
    assert provenance.commit(tmp_path) == f"{commit} with changes"


def test_the_command_can_be_run_again():
    about = provenance.circumstances("benchmarks.denoiser", ["--output", "a folder"], ROOT)
    assert about["command"] == "python -m benchmarks.denoiser --output 'a folder'"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_an_error():
    assert "--device cpu" in provenance.describe("cuda")["error"]
    about = provenance.describe("auto")
    assert about["device"] == "cpu"
    assert about["machine"] == device_name(torch.device("cpu"))
    assert about["versions"]["torch"] == torch.__version__
