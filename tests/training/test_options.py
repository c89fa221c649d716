import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from localdit.config import Config
from localdit.training import options as options_module
from localdit.training.options import parse_args
from localdit.training.parser import LATE_OPTIONS
from localdit.training.stages import read_stages, stage_of_step

ROOT = Path(__file__).parents[2]


def test_defaults_are_those_of_config():
    args, config = parse_args(["--data-root", "x"]), Config()
    assert args.learning_rate == config.learning_rate
    assert args.weight_decay == config.weight_decay
    assert args.gradient_clip == config.gradient_clip
    assert args.max_train_steps == config.max_datasteps
    assert args.token_dropout == config.token_dropout
    assert args.ema_decay == config.ema_beta
    assert args.save_interval == config.save_checkpoint_interval
    assert args.prediction_type == "epsilon"
    assert args.min_snr_gamma is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "--batch-size is 0; expected more than 0"),
        (["--learning-rate", "nan"], "--learning-rate is nan"),
        (["--num-workers", "-1"], "--num-workers is -1; expected at least 0"),
        (["--token-dropout", "1.5"], "--token-dropout is 1.5; expected 0 to 1"),
        (["--min-snr-gamma", "0"], "--min-snr-gamma is 0.0"),
        (["--transformer", "/no/where"], "--transformer /no/where does not exist"),
        (["--pretrained", "/no/where"], "--pretrained /no/where is not a folder"),
        (["--prediction-type", "x0"], "invalid choice"),
        (["--keep-checkpoints", "1"], "--keep-checkpoints is 1; expected at least 2"),
        (["--max-aspect-ratio", "0.5"], "--max-aspect-ratio is 0.5; expected 1 or more"),
        (["--max-aspect-ratio", "3", "--crop", "center"], "--crop center has only the square"),
        (["--lora-dropout", "1"], "--lora-dropout is 1.0; expected at least 0 and less than 1"),
        (["--learning-rate", "inf"], "--learning-rate is inf; expected more than 0 and finite"),
        (["--weight-decay", "inf"], "--weight-decay is inf; expected at least 0 and finite"),
        (["--lora-alpha", "inf"], "--lora-alpha is inf; expected more than 0 and finite"),
        (["--teacher-guidance-scale", "inf"], "is inf; expected at least 0 and finite"),
        (["--flow-shift", "inf"], "--flow-shift is inf; expected more than 0 and finite"),
        (["--validation-guidance-scale", "nan"], "is nan; expected at least 0 and finite"),
        (["--gradient-clip", "nan"], "--gradient-clip is nan; expected more than 0"),
        (["--seed", "4294967296"], "--seed is 4294967296; expected 0 to 4,000,000,000"),
        (["--seed", "-1"], "--seed is -1; expected 0 to 4,000,000,000"),
        (["--max-broken", "2"], "--max-broken is 2.0; expected 0 to 1"),
        (["--horizontal-flip", "-1"], "--horizontal-flip is -1.0; expected 0 to 1"),
        (["--resume", "nowhere"], "--resume nowhere does not exist, or is not a folder"),
        (["--max-skipped-steps", "-1"], "--max-skipped-steps is -1; expected at least 0"),
        (["--flow-shift", "3"], "--flow-shift is for --prediction-type flow"),
        (["--prediction-type", "flow", "--min-snr-gamma", "5"], "--min-snr-gamma is for epsilon"),
        (["--alignment-weight", "-1"], "--alignment-weight is -1.0; expected at least 0"),
        (["--alignment-blocks", "2", "4"], "--alignment-blocks is for --alignment-weight: give"),
        (["--routing-blocks", "2", "4"], "--routing-blocks is for --token-routing: give both"),
        (["--repa-weight", "-1"], "--repa-weight is -1.0; expected at least 0"),
        (["--repa-weight", "0.5"], "--repa-weight needs an image encoder, such as DINOv2: name"),
        (["--repa-encoder", "x"], "--repa-encoder is for --repa-weight: give both"),
        (["--repa-block", "2"], "--repa-block is for --repa-weight: give both"),
        (["--repa-weight", "1", "--repa-encoder", "/no/where"], "/no/where is not a folder"),
        (
            ["--repa-weight", "1", "--method", "knowledge-distillation", "--teacher", "x"],
            "--repa-weight is for --method fine-tuning",
        ),
        (["--token-routing", "1"], "expected at least 0 and less than 1"),
        (["--contrastive-weight", "1"], "expected at least 0 and less than 1"),
        (["--contrastive-weight", "0.1"], "needs another sample in each batch, but --batch-size"),
        (
            ["--contrastive-weight", "0.1", "--method", "knowledge-distillation", "--teacher", "x"],
            "--contrastive-weight is for --method fine-tuning",
        ),
        (["--validation-guidance-scale", "3"], "is for the pictures of --validation-prompts: give"),
        (["--validation-prompts", "a", "b\udcff"], "--validation-prompts: 'b\\udcff' is not"),
    ],
)  # fmt: skip
def test_wrong_options_end_the_program(capsys, options, message):
    with pytest.raises(SystemExit):
        parse_args(["--data-root", "x", *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", options_module.UNLIMITED)
def test_infinity_means_no_limit(name):
    args = parse_args(["--data-root", "x", options_module.flag(name), "inf"])
    assert getattr(args, name) == math.inf


def test_options_about_data_and_weights_have_their_defaults_late():
    args = parse_args(["--data-root", "x", "--max-crop", "1"])
    assert options_module.given(args, LATE_OPTIONS) == {"max_crop": 1.0}
    options_module.set_defaults(args)
    assert (args.crop, args.max_crop, args.horizontal_flip) == ("buckets", 1.0, 0.0)
    assert args.transformer_config == "released"


def test_packages_that_are_missing_are_named(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for option, package in (("--use-wandb", "wandb"), ("--use-tensorboard", "tensorboard")):
        with pytest.raises(SystemExit):
            parse_args(["--data-root", "x", option])
        assert f"{option} needs {package}: pip install -r" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "[Nn]o API key|api_key not configured"),
        ({"WANDB_API_KEY": "", "RANK": "0"}, "[Nn]o API key|api_key not configured"),
        ({"WANDB_API_KEY": "short"}, "API key must"),
        ({"RANK": "1"}, "[Nn]o API key|api_key not configured"),  # it is alone
        ({"RANK": "1", "WORLD_SIZE": "2"}, None),
        ({"WANDB_MODE": "offline"}, None),
        ({"WANDB_MODE": "disabled"}, None),
    ],
)
def test_wandb_without_a_login_is_refused_at_once(tmp_path, environment, reason):
    pytest.importorskip("wandb")
    known = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "NETRC"}
    done = subprocess.run(
        [sys.executable, "-m", "localdit.training", "--data-root", "gone", "--use-wandb"],
        env=known | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)} | environment,
        cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    last = done.stderr.splitlines()[-1] if done.stderr else ""
    assert "Traceback" not in done.stderr
    if reason is None:
        # There is no such data, or no other process.
        assert done.returncode == 1 and "wandb login" not in done.stderr
        assert "localdit.training: error: " in last or "localdit train: error: " in last
        return
    assert done.returncode == 2
    assert re.search(
        rf"error: --use-wandb can't log in: .*({reason}).*; run `wandb login`, set", last
    )
    assert "WANDB_MODE=offline" in last


def test_a_dry_run_does_not_log_in(monkeypatch):
    monkeypatch.setattr(options_module, "_log_in_to_wandb", lambda: pytest.fail("logged in"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "is there")
    assert parse_args(["--data-root", "x", "--use-wandb", "--dry-run"]).use_wandb


def test_the_command_line_imports_nothing_heavy():
    code = "import sys, localdit.training.options as o; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def stages_file(tmp_path, content):
    path = tmp_path / "stages.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return ["--data-root", "data", "--batch-size", "4", "--stages", str(path)]


def test_without_a_file_there_is_one_stage():
    (stage,) = parse_args(["--data-root", "data", "--max-train-steps", "7"]).stages
    assert (stage.index, stage.first_step, stage.end) == (0, 0, 7)
    assert stage.data_root == "data"


def test_stages_follow_each_other_and_change_their_options(tmp_path):
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


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_stages_may_have_a_byte_order_mark(tmp_path, encoding):
    options = stages_file(tmp_path, "")
    text = '[{"data-root": "\u00e9t\u00e9"}]'
    (tmp_path / "stages.json").write_bytes(text.encode(encoding))
    assert parse_args(options).stages[0].data_root == "\u00e9t\u00e9"


def test_contrast_needs_two_samples_in_the_batches_of_each_stage(tmp_path, capsys):
    options = stages_file(tmp_path, [{"batch-size": 2}, {"batch-size": 3}])
    options = [*options, "--contrastive-weight", "0.05", "--batch-size", "1"]
    assert [stage.batch_size for stage in parse_args(options).stages] == [2, 3]
    (tmp_path / "stages.json").write_text('[{"batch-size": 2}, {}]')
    with pytest.raises(SystemExit):
        parse_args(options)
    assert "--stages, stage 2: --contrastive-weight needs another" in capsys.readouterr().err


def test_the_stage_of_a_step(tmp_path):
    options = stages_file(tmp_path, [{"max-train-steps": 2}, {"max-train-steps": 3}])
    stages = parse_args(options).stages
    assert [stage_of_step(stages, step).index for step in range(7)] == [0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "stages.json can't be read: the file is no JSON list (Expecting property name"),
        ({}, "the file is no JSON list: it is an object"),
        ('[{"image-size": 64, "image_size": 32}]', "stage 1: 'image_size' is given twice; keep"),
        ('[{}, {"image-size": 64, "image-size": 64}]', "stage 2: 'image-size' is given twice"),
        ([], "expected a list such as"),
        ([1], "expected a list such as"),
        (
            [{}, {"seed": 3}],
            "stage 2: 'seed' is not an option of a stage. The options",
        ),
        ([{"image-size": "512"}], "stage 1: image-size is '512'; expected a value such as 512"),
        ([{"batch-size": True}], "stage 1: batch-size is True"),
        ([{"lr-schedule": "square"}], "stage 1: --lr-schedule is 'square'"),
        (
            '[{"learning-rate": Infinity}]',
            "stage 1: --learning-rate is inf; expected more than 0 a",
        ),
        ([{}, {"data-root": ""}], "stage 2: data-root: it is empty; expected a path"),
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
