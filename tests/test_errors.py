"""Errors that carry a field, in the words of Python, the command line and the page."""

import pickle

import pytest

from localdit.cli.arguments import COMMAND_LINE
from localdit.config import Config, config_field
from localdit.demo.artist import PAGE
from localdit.errors import (
    Field,
    FieldError,
    FieldExistsError,
    FieldImportError,
    FieldNotFoundError,
    FieldOSError,
    FieldTypeError,
    FieldValueError,
    Setting,
    wording,
)


def test_each_front_end_has_its_own_names_of_fields():
    with pytest.raises(ValueError) as raised:
        Config(denoising_steps=0)
    expected = " is 0; expected at least 1 and at most 1000"
    assert str(raised.value) == f"Config.denoising_steps{expected}"
    assert wording(raised.value, COMMAND_LINE) == f"--num-inference-steps{expected}"
    assert wording(raised.value, PAGE) == f"Steps{expected}"


def test_fields_that_a_front_end_lacks_are_named_as_in_python():
    with pytest.raises(ValueError) as raised:
        Config(num_layers=0)
    assert wording(raised.value, COMMAND_LINE) == str(raised.value)
    assert str(raised.value).startswith("Config.num_layers is 0")


def test_advice_suits_the_front_end():
    folder = Setting("vae", "/path", "set Config(vae='/path')")
    switch = Setting("overwrite", True, "pass overwrite=True")
    error = FieldValueError("{folder} or {switch}", folder=folder, switch=switch)
    assert str(error) == "set Config(vae='/path') or pass overwrite=True"
    assert wording(error, COMMAND_LINE) == "give --vae /path or give --overwrite"


def test_values_are_never_mistaken_for_placeholders_or_fields():
    error = FieldValueError("{field}: {path}", field=config_field("vae"), path="{vae} Config.vae")
    assert wording(error, COMMAND_LINE) == "--vae: {vae} Config.vae"


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (FieldValueError, ValueError),
        (FieldTypeError, TypeError),
        (FieldOSError, OSError),
        (FieldNotFoundError, FileNotFoundError),
        (FieldExistsError, FileExistsError),
        (FieldImportError, ImportError),
    ],
)
def test_they_are_builtin_errors_and_survive_pickling(kind, builtin):
    error = kind("{field} is {value!r}", field=Field("seed"), value="{")
    assert isinstance(error, builtin) and isinstance(error, FieldError)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == "seed is '{'"
    assert wording(again, COMMAND_LINE) == "--seed is '{'"


def test_other_errors_keep_their_message():
    assert wording(KeyError("a"), COMMAND_LINE) == "'a'"
