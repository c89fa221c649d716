"""Configurations of Diffusers' step caches, as far as its version has them."""

import pytest
from diffusers import hooks


def cache_config(name, **options):
    """A cache's configuration; the test is skipped where this version of Diffusers has none."""
    if not hasattr(hooks, name):
        pytest.skip(f"this version of Diffusers has no {name}")
    return getattr(hooks, name)(**options)
