import subprocess
import sys

import pytest

from localdit.config import Config
from localdit.training.options import parse_args


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
        (["--max-broken", "2"], "--max-broken is 2.0; expected 0 to 1"),
        (["--horizontal-flip", "-1"], "--horizontal-flip is -1.0; expected 0 to 1"),
        (["--max-skipped-steps", "-1"], "--max-skipped-steps is -1; expected at least 0"),
        (["--flow-shift", "3"], "--flow-shift is for --prediction-type flow"),
        (["--prediction-type", "flow", "--min-snr-gamma", "5"], "--min-snr-gamma is for epsilon"),
    ],
)  # fmt: skip
def test_wrong_options_end_the_program(capsys, options, message):
    with pytest.raises(SystemExit):
        parse_args(["--data-root", "x", *options])
    assert message in capsys.readouterr().err


def test_packages_that_are_missing_are_named(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for option, package in (("--use-wandb", "wandb"), ("--use-tensorboard", "tensorboard")):
        with pytest.raises(SystemExit):
            parse_args(["--data-root", "x", option])
        assert f"{option} needs {package}: pip install -r" in capsys.readouterr().err


def test_the_command_line_imports_nothing_heavy():
    code = "import sys, localdit.training.options as o; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
