"""The place of pictures: a named file, or the next free number in a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import OTHER_PICTURES, require_folder_name

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Output:
    """A place for pictures."""

    folder: Path
    stem: str  # the beginning of their names
    # The name of each picture, in order; None chooses the next free `<stem>_<number>.png`
    names: tuple[str, ...] | None = None
    overwrite: bool = False  # whether existing pictures may be replaced

    def save(self, picture: Image.Image, index: int, settings: Mapping[str, Any]) -> Path:
        """Save the `index`-th picture of a command, with its settings."""
        if self.names is None:
            return self._save_next(self.stem, picture, settings)
        return self._save(self.names[index], picture, settings)

    def save_grid(self, sheet: Image.Image) -> Path:
        """Save a sheet with all pictures."""
        if self.names is None:
            return self._save_next(f"{self.stem}_grid", sheet, None)
        return self._save(f"{self.stem}_grid.png", sheet, None)

    def _save(self, name: str, picture: Image.Image, settings: Mapping[str, Any] | None) -> Path:
        from ..images import save_image

        return save_image(picture, self.folder / name, settings, overwrite=self.overwrite)

    def _save_next(
        self, stem: str, picture: Image.Image, settings: Mapping[str, Any] | None
    ) -> Path:
        """Save under the next number, even while other processes save to the folder."""
        while True:
            taken = [path.stem for path in self.folder.glob(f"{stem}_[0-9]*.png")]
            numbers = [name.removeprefix(f"{stem}_") for name in taken]
            number = max((int(text) for text in numbers if text.isdecimal()), default=-1) + 1
            try:
                return self._save(f"{stem}_{number:03d}.png", picture, settings)
            except FileExistsError:
                continue


def plan_output(
    given: Path, stem: str, count: int, *, grid: bool = False, overwrite: bool = False
) -> Output:
    """Return the place of pictures; nothing is written.

    Args:
        given: a file named `*.png`, or a folder.
        stem: the beginning of names in a folder.
        grid: whether there is also a sheet.
        overwrite: whether existing files may be replaced.
    """
    suffix = given.suffix.lower()
    is_folder = os.path.isdir(given)
    if is_folder or suffix != ".png":
        if suffix in OTHER_PICTURES and not is_folder:
            raise ValueError(
                f"--output is {given}; pictures are saved as PNG: {given.with_suffix('.png')}"
            )
        if overwrite:
            raise ValueError(
                f"--overwrite is given, but --output is the folder {given}, in which numbers "
                "continue and nothing is replaced; leave it out, or name a file such as a.png"
            )
        return Output(require_folder_name(given), stem)
    names = [f"{given.stem}_{i:03d}.png" for i in range(count)] if count > 1 else [given.name]
    folder = given.parent
    for name in [*names, *([f"{given.stem}_grid.png"] if grid else [])]:
        _check_name(folder / name, overwrite)
    return Output(folder, given.stem, tuple(names), overwrite)


def _check_name(path: Path, overwrite: bool) -> None:
    """Check that a picture can get a name, before it is drawn."""
    is_reserved = getattr(os.path, "isreserved", None)  # on Windows, from Python 3.13 on
    if is_reserved and is_reserved(path):
        raise OSError(f"--output: {path} can't be the name of a file: Windows reserves it")
    try:
        os.lstat(path)  # not `exists`, which takes a link to nowhere or a bad name for a free one
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise OSError(f"--output: {path} can't be the name of a file: {error.strerror}") from error
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; choose another name")
    if not overwrite:
        raise FileExistsError(f"{path} already exists; choose another name, or give --overwrite")
