"""The index of a tar against what the standard library reads, and of tars that are damaged."""

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localdit.training.data.tar_index import BLOCK, TarMember, index_tar
from tests.training.data.drawn import tar_bytes

names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=300)
members = st.lists(st.tuples(names, st.binary(max_size=1500) | st.none()), max_size=5)
formats = st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])


def written(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    path.write_bytes(data)
    return str(path)


@given(members=members, format=formats)
def test_files_are_those_that_the_standard_library_finds(tmp_path_factory, members, format):
    data = tar_bytes(members, format)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [TarMember(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    index = index_tar(written(tmp_path_factory, data))
    # The standard library strips slashes from the ends of names.
    found = [member._replace(name=member.name.rstrip("/")) for member in index.members]
    assert found == [member._replace(name=member.name.rstrip("/")) for member in expected]
    assert (index.ended, index.cut, index.damaged) == (True, None, [])


def test_ustar_with_a_long_path_and_folders(tmp_path):
    name = "/".join(["folder" * 10] * 3) + "/a.png"
    data = tar_bytes([(name, b"picture")], tarfile.USTAR_FORMAT)
    (tmp_path / "a.tar").write_bytes(data)
    [member] = index_tar(str(tmp_path / "a.tar")).members
    assert member.name == name
    assert data[member.offset :][: member.size] == b"picture"


def test_sizes_beyond_octal_digits(tmp_path):
    info = tarfile.TarInfo("a.png")
    info.size = 2**36
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = tmp_path / "a.tar"
        with open(path, "wb") as file:  # a hole in it takes no room
            file.write(info.tobuf(format))
            start = file.tell()
            file.seek(2**36, io.SEEK_CUR)
            file.write(tar_bytes([("b.png", b"b")]))
        first, second = index_tar(str(path)).members
        assert first == TarMember("a.png", start, 2**36)
        assert second.name == "b.png"
        path.unlink()


def test_tars_appended_to_one_another(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"".join(tar_bytes([(name, name)]) for name in ("a.txt", "b.txt", "c.txt")))
    index = index_tar(str(path))
    assert [member.name for member in index.members] == ["a.txt", "b.txt", "c.txt"]
    assert index.ended


def test_cut_anywhere(tmp_path):
    data = tar_bytes([("a.txt", b"a" * 700), ("b.txt", b"b" * 700)], tarfile.USTAR_FORMAT)
    path = tmp_path / "a.tar"
    for length in range(1, 4 * BLOCK + 2 * 1024 + 1, 37):
        path.write_bytes(data[:length])
        if length < BLOCK:
            index = index_tar(str(path))
            assert (index.members, index.ended, index.cut) == ([], False, "")
            continue
        index = index_tar(str(path))
        whole = [member.name for member in index.members]
        ends = {"a.txt": BLOCK + 700, "b.txt": 4 * BLOCK + 700}
        assert whole == [name for name, end in ends.items() if length >= end]
        assert index.ended == (length >= 7 * BLOCK)
        if length < ends["a.txt"]:
            assert index.cut == "a.txt"
        elif 3 * BLOCK < length < 4 * BLOCK:
            assert index.cut == ""
        elif 4 * BLOCK <= length < ends["b.txt"]:
            assert index.cut == "b.txt"
        else:
            assert index.cut is None


def test_a_damaged_header_costs_one_file(tmp_path):
    data = bytearray(tar_bytes([(f"{number}.txt", b"x" * 600) for number in range(4)]))
    at = bytes(data).index(b"1.txt")
    data[at + 100] ^= 0xFF
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    index = index_tar(str(path))
    assert [member.name for member in index.members] == ["0.txt", "2.txt", "3.txt"]
    assert index.damaged == [at]
    assert index.ended


@pytest.mark.parametrize("data", [b"<html>not found</html>" * 100, b"\xff" * 2000])
def test_what_is_no_tar(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ValueError, match="doesn't begin as a tar does"):
        index_tar(str(tmp_path / "a.tar"))
