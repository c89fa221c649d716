"""Checks of single values: what was wrong, what was expected, what to do."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch


def _is_integer(value: Any) -> bool:  # NumPy's too
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def check_integer(name: str, value: Any, low: int) -> None:
    """Raise `ValueError` unless `value` is an integer of at least `low`."""
    if not _is_integer(value) or value < low:
        expected = "a positive integer" if low == 1 else f"an integer of at least {low}"
        raise ValueError(f"{name} must be {expected}, got {value!r}.")


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise `ValueError` unless `value` is a finite number in [low, high]."""
    if not _is_finite(value) or not low <= value <= high:
        expected = "a finite number" if math.isinf(low) else f"a number from {low:g} to {high:g}"
        raise ValueError(f"{name} must be {expected}, got {value!r}.")


def check_interval(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is two numbers with 0 <= start <= stop <= 1."""
    pair = isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_finite, value))
    if not pair or not 0 <= value[0] <= value[1] <= 1:
        raise ValueError(
            f"{name} must be two fractions of the steps, (start, stop) with 0 <= start <= stop <= "
            f"1, got {value!r}."
        )


def check_latent_channels(given: int, wanted: int) -> None:
    """Raise `ValueError` if an autoencoder's latents have other channels than a transformer's."""
    if given != wanted:
        raise ValueError(
            f"The autoencoder has latents of {given} channels, but the transformer takes {wanted}: "
            "use the autoencoder that the transformer was trained with."
        )


def check_generator(generator: Any, batch_size: int) -> None:
    """Raise unless `generator` is None, one `torch.Generator`, or a list of one per picture."""
    if generator is None:
        return
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"generator is a list of {len(generator)}, but {batch_size} pictures are to be made: "
            "give one generator for all, or a list with one for each picture."
        )
    for one in generator if isinstance(generator, list) else [generator]:
        if not isinstance(one, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator or a list of them, got {type(one).__name__}."
            )


def check_tensor(name: str, tensor: Any, shape: Sequence[int | None]) -> None:
    """Raise unless `tensor` is a tensor of finite values with `shape` (None: any length)."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    fits = len(shape) == tensor.ndim and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}.")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} contains NaN or infinite values.")


def check_one_of(name: str, values: Sequence[Any], available: Sequence[str]) -> None:
    """Raise `ValueError` where `values` has something that is not `available`."""
    unknown = [value for value in values if value not in available]
    if unknown:
        raise ValueError(
            f"{name}: {', '.join(map(repr, unknown))} is none of {', '.join(available)}."
        )


def check_one_each(what: str, count: int, prompts: int) -> None:
    """Refuse another number of images, or the like, than one for all prompts or one for each.

    Args:
        what: what there are so many of, such as "image".
        count: how many.
        prompts: how many prompts.

    Raises:
        ValueError: it is so.
    """
    if count not in (1, prompts):
        raise ValueError(
            f"There are {count} {what}s but {prompts} prompts: give one {what} for all, or one for "
            "each prompt."
        )
