"""Files and folders that appear complete or not at all, the text of files, and locks.

Each is written under a temporary name beside its place (`.NAME.RANDOM.tmp`), flushed to the disk,
and renamed. After a crash or a power cut, whatever has its final name is therefore complete.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

LOCK = ".lock"
OTHER_PICTURES = (
    ".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".ico", ".jfif", ".jp2", ".jpeg", ".jpg",
    ".jxl", ".pgm", ".ppm", ".svg", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
CHECKPOINTS = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # Diffusers' name
LORA_BASE = "base.json"  # names the model of a LoRA that was trained here
_UNFINISHED = re.compile(r"\..{1,40}\.[0-9a-f]{8}\.tmp", re.DOTALL)  # the names of `_beside`


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path that a user gave: a `~` at its beginning is the home folder.

    An empty one is refused: it would mean the current folder.
    """
    if not os.fspath(path):
        raise ValueError("The path is empty: give a name, or '.' for the current folder.")
    return Path(os.path.expanduser(path))


def is_hub_name(source: str | os.PathLike[str]) -> bool:
    """Return whether a source is a repository on the hub: named like one, and no local folder."""
    name = str(source)
    exists = user_path(source).exists()
    return not exists and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and name[0] not in ".~"


def require_folder_name(path: Path) -> Path:
    """Return the path of a folder, unless one would get the name of a picture or a checkpoint."""
    if path.suffix.lower() in (".png", *OTHER_PICTURES, *CHECKPOINTS) and not path.is_dir():
        raise ValueError(
            f"{path} is named like a file, but would be a folder; choose a name without "
            f"{path.suffix}"
        )
    return path


def lock_folder(folder: Path, message: str) -> None:
    """Lock a folder against other processes until this one ends, however it ends.

    The lock is on its file `.lock`, which stays. The system frees the lock of a process that was
    killed. Windows and some network file systems have no such locks: nothing is locked there.

    Raises:
        ValueError: with the message, if another process has locked the folder.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    # The file stays open, because closing it unlocks it.
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        raise ValueError(message) from None
    except OSError:  # some network file systems have no locks
        os.close(descriptor)


@contextmanager
def whole_file(path: Path, overwrite: bool = True) -> Iterator[IO[bytes]]:
    """Open a binary file that appears at `path` once all of it is on the disk, or not at all.

    A library that needs a path can write to the file's `name` instead.

    Args:
        path: the final name. Its folder must exist.
        overwrite: replace an existing file. If False, a file that another process creates
            meanwhile is kept as well.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
        OSError: if it can't be written. Nothing of it is left, and an existing file is unchanged.
    """
    unfinished = _beside(path)
    with write_errors(path, unfinished):
        try:
            with open(unfinished, "wb") as file:
                yield file
            flush_file(unfinished)
            _rename(unfinished, path, overwrite)
            flush_entries(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, check: Callable[[], object] | None = None) -> Iterator[Path]:
    """Make a folder that appears at `path` once all of it is on the disk, or not at all.

    An existing folder is replaced. Missing parents are created.

    Args:
        path: the final name.
        check: called just before the new folder gets its name; raises an error if what has that
            name by then must stay.

    Raises:
        OSError: if something can't be written. Nothing of it is left, and an existing folder is
            unchanged.
    """
    unfinished = _beside(path)
    with write_errors(path, unfinished):
        try:
            unfinished.mkdir(parents=True)
            yield unfinished
            flush_folder(unfinished)
            if check is not None:
                check()
            _replace_folder(unfinished, path)
            flush_entries(path.parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def updated_folder(path: Path, kind: Callable[[str], str | None]) -> Iterator[Path]:
    """Make a folder whose files move to `path` and its folders once all of them are on the disk.

    They replace the files there of the same names, and of the same `kind` by their names unless it
    is None. All others stay. Missing folders are created. A folder in `path` that is a link becomes
    a folder of links, so nothing elsewhere is changed.

    Raises:
        OSError: if something can't be written. Existing files are then unchanged.
    """
    unfinished = _beside(path / "saved")  # on the same disk
    with write_errors(path, unfinished):
        try:
            unfinished.mkdir(parents=True)
            yield unfinished
            flush_folder(unfinished)
            walked = [
                (path / Path(source).relative_to(unfinished), Path(source), names)
                for source, _, names in os.walk(unfinished)
            ]
            for target, *_ in walked[1:]:
                if target.is_symlink():
                    linked = list(target.resolve().glob("*"))
                    target.unlink()
                    target.mkdir()
                    for one in linked:
                        (target / one.name).symlink_to(one)
                target.mkdir(parents=True, exist_ok=True)
            for target, source, names in reversed(walked):
                for name in sorted(names):  # parts of weights, then the index that names them
                    shutil.move(source / name, target / name)
                kinds = {kind(name) for name in names} - {None}
                for file in target.iterdir():
                    if kind(file.name) in kinds and file.name not in names:
                        file.unlink()
                flush_entries(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def write_errors(path: Path | None = None, unfinished: Path | None = None) -> Iterator[None]:
    """Raise every error of writing files as an OSError of one line that names a file.

    safetensors and tokenizers, written in Rust, raise their own errors; `copytree` raises a list.

    Args:
        path: the name in the message if the error has none, as on a full disk.
        unfinished: the temporary name of what is written, which `path` replaces in the message.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, shutil.Error) and isinstance(error.args[0], list):  # of `copytree`
            raise OSError(error.args[0][0][2]) from error
        name = str(error.filename or path)
        if unfinished is not None and name.startswith(str(unfinished)):
            name = name.replace(str(unfinished), str(path), 1)
        if path is None or not error.errno or name == error.filename:
            raise
        raise OSError(error.errno, error.strerror, name) from error
    except Exception as error:
        known = re.search(r"\(os error (\d+)\)", str(error))
        if known is None:
            raise
        number = int(known[1])
        raise OSError(number, os.strerror(number), path and str(path)) from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; see `whole_file`. Text is written in UTF-8."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def has_files(folder: Path) -> bool:
    """Return whether a folder exists and has files or folders; hidden ones do not count."""
    return folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())


def start_drawing(folder: Path, count: int = 1) -> Path:
    """Prepare a folder for drawn data: a new one, an empty one, or one that was drawn before.

    Args:
        folder: gets `images`, for the pictures.
        count: number of pictures to draw.

    Returns:
        `metadata.jsonl` in the folder. It is gone until all pictures are there.

    Raises:
        ValueError: if the folder has other files, or nothing is to be drawn.
    """
    mark, metadata = folder / ".drawn", folder / "metadata.jsonl"
    if count < 1:
        raise ValueError(f"The number of pictures is {count}; expected at least 1.")
    if has_files(folder) and not mark.is_file():
        raise ValueError(
            f"{folder} has files that this version did not draw: name another folder, or remove it."
        )
    (folder / "images").mkdir(parents=True, exist_ok=True)
    mark.touch()
    metadata.unlink(missing_ok=True)
    return metadata


def unfinished_in(folder: Path) -> list[Path]:
    """Return the files and folders that a killed process was writing into a folder."""
    return [path for path in folder.glob(".*.tmp") if _UNFINISHED.fullmatch(path.name)]


def remove_unfinished(folder: Path) -> None:
    """Delete the files and folders that a killed process was writing into a folder."""
    for path in unfinished_in(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; see `parse_json`."""
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """Return the JSON object that a text holds.

    Args:
        text: the text, or its bytes in UTF-8, UTF-16 or UTF-32.
        where: where the text is from, for messages.

    Raises:
        ValueError: if it is no JSON object, or is nested too deep to be read.
    """
    return _parse_json(text, where, dict, "object")


def parse_json_list(text: str | bytes, where: str) -> list[Any]:
    """Return the JSON list that a text holds; see `parse_json`.

    Objects in it are tuples of their names and values, so that no name hides an equal one.
    """
    return _parse_json(text, where, list, "list", object_pairs_hook=tuple)


def _parse_json(text: str | bytes, where: str, kind: type, noun: str, **options: Any) -> Any:
    try:
        found = json.loads(text, **options)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON {noun} ({error}).") from None
    if not isinstance(found, kind):
        what = "an object" if isinstance(found, tuple) else f"a {type(found).__name__}"
        raise ValueError(f"{where} is no JSON {noun}: it is {what}.")
    return found


def lora_note(folder: Path) -> str:
    """Return what to do about a folder that holds a LoRA instead of a model; "" for others."""
    if not (folder / LORA_WEIGHTS).is_file():
        return ""
    base = folder / LORA_BASE
    model = f", {read_json(base).get('transformer')}" if base.is_file() else ""
    return (
        f" It holds a LoRA: name the model that the LoRA changes{model}. To generate with both, "
        "also give the LoRA as --lora, or to load_lora_weights."
    )


def remove_folder(path: Path) -> None:
    """Delete a folder. It is renamed first, so that no half-deleted folder has its name."""
    doomed = _beside(path)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Wait until all files in a folder and below it are on the disk; links are not followed."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not (Path(parent) / name).is_symlink():
                flush_file(Path(parent) / name)
        flush_entries(Path(parent))


def flush_file(path: Path) -> None:
    """Wait until the bytes of a file are on the disk."""
    _flush(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)


def flush_entries(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, on systems that support it."""
    if os.name == "nt":  # folders can't be opened there
        return
    try:
        _flush(folder, os.O_RDONLY)
    except OSError as error:  # some network file systems can't flush folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path:
    """Return a temporary name in the same folder, different in every process and on every call.

    It has the beginning of the name, since a name of 255 bytes can't get longer.
    """
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.tmp")


def _rename(source: Path, target: Path, overwrite: bool) -> None:
    if not overwrite:
        try:
            os.link(source, target)  # fails if the target exists, also if it appeared just now
            return
        except FileExistsError:
            raise FileExistsError(f"{target} already exists") from None
        except OSError:  # a file system without links
            if target.exists():
                raise FileExistsError(f"{target} already exists") from None
    os.replace(source, target)


def _replace_folder(source: Path, target: Path) -> None:
    if not target.exists():
        os.replace(source, target)
        return
    old = _beside(target)
    os.replace(target, old)
    try:
        os.replace(source, target)
    except OSError:
        os.replace(old, target)
        raise
    if old.is_symlink():
        old.unlink()
    else:
        shutil.rmtree(old, ignore_errors=True)


# Text


def text_encoding(start: bytes) -> str:
    """Return the encoding of a text file: that of its byte order mark, or else UTF-8.

    Args:
        start: at least the first four bytes, if there are as many.
    """
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return "utf-8-sig"


def decode_text(data: bytes, name: object = "it") -> str:
    r"""Return the text of a file: UTF-8, or UTF-16 or UTF-32 with a byte order mark.

    Lines end with `\n`. Byte order marks are dropped, also those between files that were joined.

    Args:
        data: all bytes of the file.
        name: its name in errors.

    Raises:
        ValueError: if it is other text, or has zero bytes.
    """
    encoding = text_encoding(data)
    known = encoding.upper().removesuffix("-SIG")
    try:
        text = data.decode(encoding).replace("\ufeff", "")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not {known} text (at byte {error.start}: {error.reason}); save it as UTF-8"
        ) from error
    if "\0" in text:
        raise ValueError(
            f"{name} is not {known} text: it has zero bytes, as binary files have, and UTF-16 "
            "without a byte order mark; save it as UTF-8"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_unicode(text: str) -> bool:
    """Return whether a text can be encoded; half surrogate pairs, which JSON may hold, can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
