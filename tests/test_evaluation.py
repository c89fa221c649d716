import json

import pytest

from localdit.evaluation import Layout, read_prompts

GENEVAL = '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "%s"}\n'


def test_lines_of_geneval_are_numbered_and_kept_whole(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text(GENEVAL % "a photo of a bench" + "\n" + GENEVAL % "a photo of a bear", "utf-8")
    first, second = read_prompts(path)
    assert (first.name, first.text) == ("00000", "a photo of a bench")
    assert (second.name, second.text) == ("00001", "a photo of a bear")
    assert first.record["tag"] == "single_object"


def test_files_of_dpg_bench_are_named_by_their_stems(tmp_path):
    (tmp_path / "b.txt").write_text("Zwei Füchse\n", "utf-8")
    (tmp_path / "a.txt").write_text("a boat", "utf-8")
    (tmp_path / "notes.md").write_text("no prompt", "utf-8")
    assert [(one.name, one.text) for one in read_prompts(tmp_path)] == [
        ("a", "a boat"), ("b", "Zwei Füchse")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "has no prompts; expected lines such as"),
        ('{"prompt": "a"}\n{"prompt": ""}\n', "line 2: \"prompt\" is ''; expected text"),
        ('{"text": "a"}\n', 'line 1: "prompt" is None'),
        ('{"prompt": ["a"]}\n', "line 1: \"prompt\" is \\['a'\\]"),
        ('{"prompt": "a"}\nnot JSON\n', "line 2"),
        ("[1]\n", "line 1"),
        ('{"prompt": "a", "scene": {"objects": 3}}\n', 'line 1: "scene" is not a scene'),
        ('{"prompt": "a", "scene": null}\n', 'line 1: "scene" is not a scene'),
    ],
)
def test_a_file_without_sound_prompts_is_refused(text, message, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_an_empty_folder_and_a_missing_path_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no prompts; expected text files"):
        read_prompts(tmp_path)
    (tmp_path / "a.txt").write_text(" \n", "utf-8")
    with pytest.raises(ValueError, match=r"a\.txt: \"prompt\" is ''"):
        read_prompts(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_prompts(tmp_path / "nowhere")


def test_any_record_of_json_is_kept(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(r'{"prompt": "ein Füchschen", "tag": "\ud83d", "\ud83d": null}', "utf-8")
    (prompt,) = read_prompts(path)
    Layout(tmp_path / "out", 1, sheets=False).prepare(prompt)
    (kept,) = read_prompts(tmp_path / "out/pictures/00000/metadata.jsonl")
    assert kept == prompt


@pytest.mark.parametrize("sheets", [False, True])
def test_the_places_are_those_that_the_scorers_read(sheets, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(GENEVAL % "a photo of a café", "utf-8")
    (prompt,) = read_prompts(path)
    layout = Layout(tmp_path / "out", 2, sheets)
    layout.prepare(prompt)
    folder = tmp_path / "out/pictures/00000"
    assert layout.pictures(prompt) == [folder / "samples/0000.png", folder / "samples/0001.png"]
    assert json.loads((folder / "metadata.jsonl").read_text("utf-8")) == prompt.record
    assert layout.sheet(prompt) == (tmp_path / "out/sheets/00000.png" if sheets else None)
