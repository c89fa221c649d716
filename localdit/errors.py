"""Errors that carry the field they are about.

`str(error)` names the field as Python code does: `Config.height is 0; ...`. A front end names it in
its own words: the command line says `--height is 0; ...`, the page `Height is 0; ...`. Each front
end has one table of names, a `Vocabulary`, and asks `wording(error, vocabulary)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Field:
    """A field as messages name it."""

    name: str  # the field's standard name, by which a front end looks up its own
    python: str = ""  # the name in Python code, such as `Config.height`; by default `name`


@dataclass(frozen=True)
class Setting:
    """The advice to set a field, such as `set Config(vae='folder')` or `give --vae folder`."""

    name: str  # the field's standard name
    value: object  # the value to set; True for a switch
    python: str  # the advice to those who write Python


@dataclass(frozen=True)
class Vocabulary:
    """The words of a front end."""

    # The front end's name of each field; any other field is named as in Python
    names: Mapping[str, str] = field(default_factory=dict)
    # The advice to set a field, with `{name}` and `{value}`; the value of a switch is empty
    advice: str = ""

    def phrase(self, value: object) -> object:
        """Return the phrase for a `Field` or a `Setting`; anything else is returned unchanged."""
        if isinstance(value, Field):
            return self.names.get(value.name) or value.python or value.name
        if isinstance(value, Setting):
            if value.name not in self.names:
                return value.python
            shown = "" if value.value is True else value.value
            return self.advice.format(name=self.names[value.name], value=shown).rstrip()
        return value


PYTHON = Vocabulary()


class FieldError(Exception):
    """A mistake in the value of a field.

    Args:
        template: the message, with a placeholder for each of `values`, as for `str.format`.
        **values: what the message mentions: a `Field`, a `Setting`, or anything else.
    """

    def __init__(self, template: str, **values: Any) -> None:
        self.template = template
        self.values = values
        super().__init__(self.worded(PYTHON))

    def worded(self, vocabulary: Vocabulary) -> str:
        """Return the message in the words of a front end."""
        if not self.values:
            return self.template
        phrases = {name: vocabulary.phrase(value) for name, value in self.values.items()}
        return self.template.format(**phrases)


class FieldValueError(FieldError, ValueError):
    """A value outside its range, or one that contradicts another."""


class FieldTypeError(FieldError, TypeError):
    """A value of the wrong type."""


class FieldOSError(FieldError, OSError):
    """A file that cannot be read, written or fetched."""


class FieldNotFoundError(FieldError, FileNotFoundError):
    """A file or folder that is missing."""


class FieldExistsError(FieldError, FileExistsError):
    """A file or folder that must not be replaced."""


class FieldImportError(FieldError, ImportError):
    """A package that a value needs and that is not installed."""


def wording(error: BaseException, vocabulary: Vocabulary) -> str:
    """Return the message of any error, its fields named in the words of a front end.

    That of the operating system about a file is its path and what is wrong.
    """
    if isinstance(error, FieldError):
        return error.worded(vocabulary)
    if isinstance(error, OSError) and error.filename and not error.filename2:
        return f"{error.filename}: {error.strerror}"
    return str(error)
