"""The content of a file decides its kind; damaged, foreign and hostile files are refused."""

import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from localdit.checkpoint.reading import CheckpointFile, few

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.bfloat16)}


def save(state, path):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.fixture(params=["w.safetensors", "w.pt"])
def path(request, tmp_path):
    return save(STATE, tmp_path / request.param)


def test_names_shapes_and_values_are_read(path):
    file = CheckpointFile(path)
    assert file.infos["a.weight"] == ((2, 3), torch.float32)
    assert file.infos["a.bias"] == ((2,), torch.bfloat16)
    for name, tensor in file.tensors(["a.bias", "a.weight"]):
        assert torch.equal(tensor, STATE[name])


def test_mapping_the_file_again_changes_no_values(path, monkeypatch):
    monkeypatch.setattr("localdit.checkpoint.reading._MAPPED_BYTES", 0)
    read = {name: tensor.clone() for name, tensor in CheckpointFile(path).tensors(STATE)}
    assert all(torch.equal(read[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("suffix", [".bin", ".pth", ".ckpt", ".pt", ""])
def test_the_content_decides_the_kind_not_the_suffix(path, suffix, tmp_path):
    expected = CheckpointFile(path).kind
    renamed = path.rename(tmp_path / f"renamed{suffix}")
    assert CheckpointFile(renamed).kind == expected


def test_an_archive_named_safetensors_has_to_be_renamed(tmp_path):
    path = save(STATE, tmp_path / "w.pt").rename(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"is a .pt file by its content. Rename it to '\*.pt'"):
        CheckpointFile(path)


@pytest.mark.parametrize("key", ["state_dict", "model", "ema", "ema_state_dict", "module"])
def test_a_state_dict_under_a_known_key(key, tmp_path):
    contents = {key: {**STATE, "decay": 0.99, "optimization_step": 3}, "epoch": 7}
    file = CheckpointFile(save(contents, tmp_path / "w.pt"))
    assert file.wrapper == key
    assert set(file.infos) == set(STATE)


def test_averaged_weights_are_preferred(tmp_path):
    ema = {"a": torch.zeros(1)}
    file = CheckpointFile(save({"model": STATE, "ema": ema}, tmp_path / "w.pt"))
    assert (file.wrapper, list(file.infos)) == ("ema", ["a"])


def test_counters_beside_the_weights_are_ignored(tmp_path):
    state = {**STATE, "n_averaged": torch.tensor(5)}
    for name in ("w.pt", "w.safetensors"):
        assert set(CheckpointFile(save(state, tmp_path / name)).infos) == set(STATE)


def test_a_list_of_averaged_weights_has_no_names(tmp_path):
    contents = {"decay": 0.9, "shadow_params": [torch.ones(2)]}
    with pytest.raises(ValueError, match="shadow_params.*without the names"):
        CheckpointFile(save(contents, tmp_path / "w.pt"))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([torch.ones(2)], "holds a list; expected a dict"),
        ({**STATE, "epoch": 3}, "'epoch' holds a int"),
        ({**STATE, "nested": {"b": torch.ones(1)}}, "'nested' holds a dict"),
        ({0: torch.ones(2)}, "0 holds a Tensor; expected a dict from names"),
        ({}, "holds no tensors"),
        ({"a": torch.eye(2).to_sparse()}, "'a' is a sparse"),
        ({"a": torch.empty(2, device="meta")}, "'a' is a sparse, quantized or empty-backed"),
        ({"a": torch.zeros(1).expand(10**9, 10**9)}, r"'a' claims \(1000000000, 1000000000\)"),
    ],
)
def test_anything_but_named_plain_tensors_is_refused(contents, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CheckpointFile(save(contents, tmp_path / "w.pt"))


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file_is_refused(path, fraction):
    size = path.stat().st_size
    os.truncate(path, max(1, int(size * fraction)))
    with pytest.raises(ValueError, match=path.name):
        CheckpointFile(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is an empty file"),
        (b"\n<!DOCTYPE html><html>not found</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n0000", "is a picture"),
        (b"\xff\xd8\xff\xe0 JFIF", "is a picture"),
        (b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
        (b"some text that is no checkpoint", "starts with b'some tex'"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{not json at all", "damaged .safetensors"),
    ],
)
def test_a_foreign_file_is_named_for_what_it_is(content, message, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        CheckpointFile(path)


def test_another_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("word/document.xml", "<a/>")
    with pytest.raises(ValueError, match="archive of another kind"):
        CheckpointFile(tmp_path / "w.pt")


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        CheckpointFile(tmp_path / "w.pt")
    with pytest.raises(ValueError, match="is a folder.*from_pretrained"):
        CheckpointFile(tmp_path)


class Payload:
    """Unpickles to a command that leaves a file behind."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: {**STATE, "b": p}])
def test_a_hostile_pickle_executes_nothing(wrap, tmp_path):
    trace = tmp_path / "trace"
    torch.save(wrap(Payload(trace)), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"refers to '\w+.system'.*nothing in it was executed"):
        CheckpointFile(tmp_path / "w.pt")
    assert not trace.exists()
    torch.load(tmp_path / "w.pt", weights_only=False)
    assert trace.exists(), "the payload is no payload"


def test_a_bare_pickle_is_not_even_opened(tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "w.pt").write_bytes(pickle.dumps(Payload(trace)))
    with pytest.raises(ValueError, match="bare pickle, which is never opened"):
        CheckpointFile(tmp_path / "w.pt")
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="bare pickle, which is never opened"):
        CheckpointFile(tmp_path / "old.pt")
    assert not trace.exists()


def test_few_names_and_a_count():
    assert few("abc") == "'a', 'b', 'c'"
    assert few("abcde") == "'a', 'b', 'c' and 2 more"


def test_a_flipped_bit_in_a_record_is_noticed(tmp_path):
    path = tmp_path / "w.pt"
    state = {"a": torch.arange(1000.0), "b": torch.ones(10)}
    torch.save(state, path)
    assert dict(CheckpointFile(path).tensors(state)).keys() == state.keys()
    content = bytearray(path.read_bytes())
    place = content.index(state["a"].numpy().tobytes()) + 2001
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged: a record is not what was saved .*CRC"):
        list(CheckpointFile(path).tensors(state))


def test_a_file_that_was_saved_without_sums_is_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(1000)}, tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    ((_, tensor),) = CheckpointFile(tmp_path / "w.pt").tensors(["a"])
    assert torch.equal(tensor, torch.ones(1000))
