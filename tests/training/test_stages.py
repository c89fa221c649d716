import json

import pytest

from localdit.training.options import parse_args, read_stages, stage_of_step


def stages_file(tmp_path, content):
    path = tmp_path / "stages.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return ["--data-root", "data", "--batch-size", "4", "--stages", str(path)]


def test_without_a_file_there_is_one_stage():
    (stage,) = parse_args(["--data-root", "data", "--max-train-steps", "7"]).stages
    assert (stage.index, stage.first_step, stage.end) == (0, 0, 7)
    assert stage.data_root == "data"


def test_stages_follow_one_another_and_change_what_they_say(tmp_path):
    options = stages_file(
        tmp_path,
        [
            {"image-size": 256, "max-train-steps": 10},
            {"image_size": 512, "max-train-steps": 5, "batch-size": 2, "learning-rate": 1e-5},
            {"data-root": "best", "max-train-steps": 1},
        ],
    )
    first, second, third = parse_args(options).stages
    assert [(s.first_step, s.end) for s in (first, second, third)] == [(0, 10), (10, 15), (15, 16)]
    assert [s.image_size for s in (first, second, third)] == [256, 512, 512]
    assert [s.batch_size for s in (first, second, third)] == [4, 2, 4]
    assert [s.data_root for s in (first, second, third)] == ["data", "data", "best"]
    assert second.learning_rate == 1e-5
    assert second.global_batch(num_processes=3) == 6


def test_the_stage_of_a_step(tmp_path):
    options = stages_file(tmp_path, [{"max-train-steps": 2}, {"max-train-steps": 3}])
    stages = parse_args(options).stages
    assert [stage_of_step(stages, step).index for step in range(7)] == [0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "can't be read as JSON"),
        ({}, "expected a list such as"),
        ([], "expected a list such as"),
        ([1], "expected a list such as"),
        (
            [{}, {"seed": 3}],
            "stage 2: 'seed' is not an option of a stage. The options",
        ),
        ([{"image-size": "512"}], "stage 1: image-size is '512'; expected a value such as 512"),
        ([{"batch-size": True}], "stage 1: batch-size is True"),
        ([{"lr-schedule": "square"}], "stage 1: --lr-schedule is 'square'"),
        ([{"max-train-steps": 0}], "stage 1: --max-train-steps is 0; expected more than 0"),
    ],
)
def test_wrong_stages_end_the_program(tmp_path, capsys, content, message):
    with pytest.raises(SystemExit):
        parse_args(stages_file(tmp_path, content))
    assert message in capsys.readouterr().err


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.json can't be read"):
        read_stages(tmp_path / "nowhere.json")
