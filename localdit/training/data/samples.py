"""What training data is made of: samples, and the places their bytes are read from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Readable(Protocol):
    """Something stored: a file, a member of a tar, a cell of a table."""

    def read(self) -> bytes:
        """All of its bytes.

        Raises:
            OSError: if they can't be read.
        """


class Blob(NamedTuple):
    """Bytes of a file: all of it, or `size` of them from `offset`."""

    path: str
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The bytes; fewer than `size` where the file ends before."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read() if self.size is None else file.read(self.size)


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture that is known to be there, with its captions, at least one.

    Attributes:
        id: what names it in reports: its path within the data, the same on every machine.
        image: where its bytes are.
        captions: each visit draws one of them.
        height, width: in pixels, upright.
    """

    id: str
    image: Readable
    captions: tuple[str, ...]
    height: int
    width: int
