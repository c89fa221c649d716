"""A pipeline around a checkpoint in one file, which holds the transformer alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import Config
from ..models.transformer import LocalDiTTransformer2DModel
from ..parts import PARTS, load_parts, locate_parts

if TYPE_CHECKING:
    from typing_extensions import Self


class SingleFileMixin:
    """`from_single_file` for a pipeline."""

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        config: str | Path | None = None,
        torch_dtype: torch.dtype | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Load a checkpoint in one file, and the parts that it lacks from elsewhere.

        Args:
            path: `.safetensors`, or `.pt` with nothing but tensors in it: a file, or its address on
                the Hugging Face hub.
            config: a pipeline, as folder or repository of the hub, whose other parts are taken; by
                default those of the released model are, from their repositories.
            torch_dtype: dtype of all parts; None keeps that of each.
            local_files_only: take files of the hub from the cache, and fetch nothing.
            **kwargs: parts that are there already, such as `vae`; and arguments of
                `localdit.checkpoint.load_transformer`.

        Raises:
            OSError: the file or a part is missing, or cannot be fetched.
            ValueError: the file is no checkpoint of a LocalDiT, is damaged, or contradicts an
                argument.
            TypeError: for an unknown argument.
        """
        given = {name: kwargs.pop(name) for name in PARTS if name in kwargs}
        absent = [name for name in PARTS if name not in given]
        released = Config()
        where = {} if config else _locate(released, absent, local_files_only)
        transformer = LocalDiTTransformer2DModel.from_single_file(
            path, torch_dtype=torch_dtype, local_files_only=local_files_only, **kwargs
        )
        if config:
            return cls.from_pretrained(  # type: ignore[attr-defined]
                config,
                transformer=transformer,
                torch_dtype=torch_dtype,
                local_files_only=local_files_only,
                **given,
            )
        parts = load_parts(released, where, torch.device("cpu"), torch_dtype)
        return cls(**{"transformer": transformer, **parts, **given})


def _locate(config: Config, absent: list[str], local_files_only: bool) -> dict[str, Any]:
    try:
        return locate_parts(config, absent, local_files_only)
    except OSError as error:
        raise OSError(
            f"{error}; or give from_single_file a pipeline as `config`, or the parts themselves: "
            f"{', '.join(absent)}."
        ) from error
