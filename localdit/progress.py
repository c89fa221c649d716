"""Progress bars are for terminals; in logs and pipes they are noise."""

from __future__ import annotations

import sys


def hide_loading_bars() -> None:
    """Have Diffusers and Transformers show bars of loading on terminals only."""
    if sys.stderr.isatty():
        return
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def hidden(hide: bool = False) -> bool | None:
    """tqdm's `disable`: as told, or off terminals."""
    return True if hide else None
