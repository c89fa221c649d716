"""Tests of samples in WebDataset tars, of damaged tars, and of patterns of paths."""

import gzip
import io
import os
import pickle
import random
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localdit.training.data.finding import examine
from localdit.training.data.samples import Candidate, read_captions
from localdit.training.data.tars import (
    BLOCK,
    TarMember,
    expand_braces,
    find_tars,
    index_tar,
    list_tars,
)
from tests.training.data.drawn import picture_bytes, tar_bytes, write_files


def listed(path, members):
    """Return the caption, or the kind of the fault, of each entry of a tar by id."""
    path.write_bytes(members if isinstance(members, bytes) else tar_bytes(members))
    entries = {}
    for entry in list_tars([str(path)]):
        if not isinstance(entry, Candidate):
            value = entry.kind
        else:
            value = entry.captions and (entry.image.read(), read_captions(entry.captions))
        entries.setdefault(entry.id, []).append(value)
    return entries


def test_samples_by_their_names(tmp_path):
    members = [
        ("./plain.jpg", "P"), ("./plain.txt", "of plain"),
        ("a/b.seg.png", "S"), ("a/b.PNG", "B"), ("a/b.json", '{"caption": ["1", "2"]}'),
        ("a/b.c/d.webp", "D"), ("a/b.c/d.caption", "of d"), ("a/b.c/d.cls", "5"),
        ("c/b.jpg", "C"), ("c/b.json", "{}"), ("c/b.txt", "text first"),
        ("silent.jpg", "S"),
        ("._plain.jpg", "junk of a Mac"), ("README", "no suffix"), ("folder/", None),
    ]  # fmt: skip
    assert listed(tmp_path / "t.tar", members) == {
        "t.tar/plain": [(b"P", ("of plain",))],
        "t.tar/a/b": [(b"B", ("1", "2"))],
        "t.tar/a/b.c/d": [(b"D", ("of d",))],
        "t.tar/c/b": [(b"C", ("text first",))],
        "t.tar/silent": [None],
    }


def test_members_in_any_order(tmp_path):
    members = [
        (f"{number}.{suffix}", f"{number}") for number in range(50) for suffix in ("jpg", "txt")
    ]
    random.Random(0).shuffle(members)
    assert listed(tmp_path / "t.tar", members) == {
        f"t.tar/{number}": [(b"%d" % number, (f"{number}",))] for number in range(50)
    }


def test_halves_and_doubles(tmp_path):
    members = [
        ("a.jpg", "1"), ("a.txt", "first"), ("a.jpg", "2"), ("a.txt", "second"), ("a.txt", "third"),
        ("b.txt", "no picture"), ("c.heic", "H"), ("c.txt", "of c"), ("d.npy", "N"),
        ("e.jpg", "J"), ("e.txt", "of e"), ("e.PNG", "P"), ("e.webp", "W"), ("e.seg.png", "S"),
    ]  # fmt: skip
    assert listed(tmp_path / "t.tar", members) == {
        "t.tar/a": [(b"1", ("first",)), "duplicate", "duplicate"],
        "t.tar/b": ["half sample"],
        "t.tar/c": ["half sample"],
        "t.tar/d": ["half sample"],
        "t.tar/e": [(b"J", ("of e",))],
        "t.tar/e.png": ["duplicate"],
        "t.tar/e.webp": ["duplicate"],
    }


def test_a_tar_cut_anywhere_gives_its_whole_samples_and_at_most_one_half(tmp_path):
    members = [
        (f"{number}.{suffix}", content * 300)
        for number in range(3)
        for suffix, content in (("jpg", b"P"), ("txt", b"caption "))
    ]
    data = tar_bytes(members)
    ends = {}
    for number in range(3):  # behind the last byte of each sample's caption
        at = data.index(b"%d.txt" % number)
        ends[f"t.tar/{number}"] = at + 512 + 2400
    starts = [data.index(b"%d.jpg" % number) for number in range(3)]
    for length in [*range(1, len(data), 101), *starts[1:], *ends.values(), len(data)]:
        entries = listed(tmp_path / "t.tar", data[:length])
        whole = [id for id, end in ends.items() if length >= end]
        assert [id for id, values in entries.items() if values[0] != "half sample"] == whole
        assert all(len(values) == 1 for values in entries.values())
        halves = {*entries} - {*whole}
        begun = sum(length > start for start in starts) > len(whole)
        assert len(halves) == int(begun)
        # Where the name is known it is given.
        if begun and length >= starts[len(whole)] + 512:
            assert halves == {f"t.tar/{len(whole)}"}


def test_a_picture_alone_is_half_a_sample_at_a_cut_and_without_a_caption_elsewhere(tmp_path):
    whole = tar_bytes([("a.jpg", "A"), ("b.jpg", "B")])
    assert listed(tmp_path / "t.tar", whole) == {"t.tar/a": [None], "t.tar/b": [None]}
    cut = whole[: whole.index(b"b.jpg") + 1024]
    assert listed(tmp_path / "t.tar", cut) == {"t.tar/a": [None], "t.tar/b": ["half sample"]}


def test_a_damaged_header(tmp_path):
    data = bytearray(tar_bytes([(f"{n}.{s}", f"{n}") for n in range(3) for s in ("jpg", "txt")]))
    at = bytes(data).index(b"1.jpg")
    data[at + 110] ^= 1
    assert listed(tmp_path / "t.tar", bytes(data)) == {
        "t.tar/0": [(b"0", ("0",))],
        "t.tar/1": ["half sample"],
        "t.tar/2": [(b"2", ("2",))],
        f"t.tar, byte {at:,}": ["bad entry"],
    }


def test_a_file_that_is_not_a_tar_does_not_affect_the_others(tmp_path):
    good = tar_bytes([("a.jpg", picture_bytes()), ("a.txt", "of a")])
    write_files(tmp_path, {"0.tar": "<html>" * 200, "1.tar": good, "2.tar": b""})
    paths = [str(tmp_path / f"{number}.tar") for number in range(4)]
    samples, faults = examine(list_tars(paths))
    assert [sample.id for sample in samples] == ["1.tar/a"]
    assert {kind: examples[0].id for kind, examples in faults.examples.items()} == {
        "unreadable": "0.tar",
        "empty": "2.tar",
    }
    assert faults.counts == {"unreadable": 2, "empty": 1}


def test_compressed_tars(tmp_path):
    data = gzip.compress(tar_bytes([("a.jpg", "A"), ("a.txt", "of a")]))
    write_files(tmp_path, {"a.tar.gz": data, "b.tar": data})
    for name in ("a.tar.gz", "b.tar"):
        with pytest.raises(ValueError, match=rf"{name} is compressed.*Unpack"):
            list_tars([str(tmp_path / name)])


def test_only_pictures_and_captions_are_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    trap = pickle.dumps(Trap())
    members = [(f"a.{suffix}", trap) for suffix in ("pkl", "pickle", "pyd", "pth", "pt", "npy")]
    picture = [("a.jpg", picture_bytes()), ("a.txt", "of a")]
    (tmp_path / "t.tar").write_bytes(tar_bytes(members + picture))
    samples, faults = examine(list_tars([str(tmp_path / "t.tar")]))
    assert (len(samples), faults.total) == (1, 0)
    assert not (tmp_path / "executed").exists()


def test_ids_are_relative_to_the_common_folder_of_the_tars(tmp_path):
    data = tar_bytes([("x.jpg", "X"), ("x.txt", "of x")])
    write_files(tmp_path, {"one/0.tar": data, "two/0.tar": data})
    paths = [str(tmp_path / "one/0.tar"), str(tmp_path / "two/0.tar")]
    assert [entry.id for entry in list_tars(paths)] == ["one/0.tar/x", "two/0.tar/x"]
    assert [entry.id for entry in list_tars(paths[1:])] == ["0.tar/x"]
    assert [entry.id for entry in list_tars(paths[1:], tmp_path)] == ["two/0.tar/x"]


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("a.tar", ["a.tar"]),
        ("{000..002}.tar", ["000.tar", "001.tar", "002.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{098..101}", ["098", "099", "100", "101"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,bc,}/x", ["a/x", "bc/x", "/x"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("x{a,b{1..2}}y", ["xay", "xb1y", "xb2y"]),
    ],
)
def test_braces(pattern, paths):
    assert expand_braces(pattern) == paths


@pytest.mark.parametrize("pattern", ["{0..99999999999}", "{0..9999}{0..9999}"])
def test_too_many_tars(pattern):
    with pytest.raises(ValueError, match="more than 1,000,000"):
        expand_braces(pattern)


def test_finding_tars(tmp_path):
    names = ["a/000.tar", "a/001.tar", "b/001.tar", "odd[1]{2}.tar"]
    write_files(tmp_path, dict.fromkeys(names, b""))
    found = {
        pattern: [os.path.relpath(path, tmp_path) for path in find_tars(f"{tmp_path}/{pattern}")]
        for pattern in ("a/*.tar", "*/001.tar", "a/{000..001}.tar", "{a,b}/*.tar", "odd[1]{2}.tar")
    }
    assert found == {
        "a/*.tar": names[:2],
        "*/001.tar": names[1:3],
        "a/{000..001}.tar": names[:2],
        "{a,b}/*.tar": names[:3],
        "odd[1]{2}.tar": names[3:],
    }
    with pytest.raises(FileNotFoundError, match=r"a/002\.tar, .*a/004\.tar, and 95 more"):
        find_tars(f"{tmp_path}/a/{{000..099}}.tar")
    with pytest.raises(FileNotFoundError, match=r"c/\*\.tar"):
        find_tars(f"{tmp_path}/{{a,c}}/*.tar")


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=300)
members = st.lists(st.tuples(names, st.binary(max_size=1500) | st.none()), max_size=5)
formats = st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])


def written(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    path.write_bytes(data)
    return str(path)


@given(members=members, format=formats)
def test_files_are_the_same_as_with_the_standard_library(tmp_path_factory, members, format):
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


def test_concatenated_tars(tmp_path):
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


def header_with_size(name, field):
    """Return a header whose field of the size has these bytes, with the right checksum."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


SIZES = {
    "negative": b"-0000001000\0",
    "negative, to the first header": b"-0000004000\0",
    "negative in base 256": b"\xff" * 11 + b"\x00",
    "huge in base 256": b"\x80" + b"\xff" * 11,
    "huge": b"77777777777\0",
    "within another file": b"00000001001\0",
    "with an underscore": b"0000000_100\0",
    "no number": b"size\0\0\0\0\0\0\0\0",
}


@pytest.mark.parametrize("field", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_header_with_an_absurd_size_costs_one_file(tmp_path, field, place):
    sound = [tar_bytes([(f"{n}.txt", b"x" * 600)])[: 3 * BLOCK] for n in range(3)]
    lying = header_with_size("lying.txt", field) + b"y" * BLOCK
    parts = [*sound[:place], lying, *sound[place:]]
    path = tmp_path / "a.tar"
    path.write_bytes(b"".join(parts) + bytes(2 * BLOCK))
    index = index_tar(str(path))
    expected = [(f"{n}.txt", (3 * n + 1 + 2 * (n >= place)) * BLOCK, 600) for n in range(3)]
    assert index.members == [TarMember(*member) for member in expected]
    assert index.damaged == [3 * place * BLOCK]
    assert index.ended


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_long_name_of_absurd_size_costs_only_the_name(tmp_path, kind):
    info = tarfile.TarInfo("long")
    info.type, info.size = kind, 2**40
    sound = tar_bytes([("a.txt", b"a"), ("b.txt", b"b")])
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + sound)
    index = index_tar(str(tmp_path / "a.tar"))
    assert [member.name for member in index.members] == ["a.txt", "b.txt"]
    assert index.damaged == [0]


@pytest.mark.parametrize("digits", ["9" * 30, "9" * 5000])
def test_an_absurd_size_ahead_of_a_header(tmp_path, digits):
    info = tarfile.TarInfo("a.txt")
    info.pax_headers = {"size": digits}
    sound = tar_bytes([("b.txt", b"b")])
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.PAX_FORMAT) + sound)
    index = index_tar(str(tmp_path / "a.tar"))
    assert [member.name for member in index.members] == ["b.txt"]


def test_a_damaged_first_header_costs_one_file(tmp_path):
    data = bytearray(tar_bytes([(f"{number}.txt", b"x" * 600) for number in range(3)]))
    data[100] ^= 0xFF
    (tmp_path / "a.tar").write_bytes(data)
    index = index_tar(str(tmp_path / "a.tar"))
    assert [member.name for member in index.members] == ["1.txt", "2.txt"]
    assert index.damaged == [0]


@pytest.mark.parametrize("name", ["../../etc/passwd.txt", "/etc/passwd.txt"])
def test_names_and_links_that_lead_out_of_a_tar_are_only_names(tmp_path, name):
    assert listed(tmp_path / "t.tar", [(name, "inside"), ("a.jpg", None), ("a.txt", "of a")]) == {
        f"t.tar/{name.removesuffix('.txt')}": ["half sample"],
        "t.tar/a": ["half sample"],
    }


@pytest.mark.parametrize("data", [b"<html>not found</html>" * 100, b"\xff" * 2000])
def test_other_files_are_refused(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ValueError, match="doesn't begin with the header of a tar"):
        index_tar(str(tmp_path / "a.tar"))
