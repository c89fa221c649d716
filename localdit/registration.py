"""Diffusers' own entry points find our classes, whichever of the two is imported first.

`DiffusionPipeline.from_pretrained` looks pipelines and models up by name in the module `diffusers`,
and the `AutoPipelineFor...` classes in dictionaries. Neither is imported here: that would take
seconds. What has to be added is added at once if they are there, or else when they come.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

PIPELINES = {
    "AUTO_TEXT2IMAGE_PIPELINES_MAPPING": "LocalDiTPipeline",
    "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING": "LocalDiTImg2ImgPipeline",
    "AUTO_INPAINT_PIPELINES_MAPPING": "LocalDiTInpaintPipeline",
}
NAMES = (*PIPELINES.values(), "LocalDiTTransformer2DModel")


def register() -> None:
    """Make our classes known to Diffusers, now or when it is imported."""
    after_import("diffusers", _add_names)
    after_import("diffusers.pipelines.auto_pipeline", _add_to_auto_pipelines)


def after_import(name: str, action: Callable[[], None]) -> None:
    """Do something once the module `name` has been imported: now, if it has been already."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _AfterImport(name, action))


class _AfterImport:
    """A finder (PEP 451) of one module: the others find it, and an action follows its execution."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name = name
        self.action = action

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The module's spec as another finder gives it."""
        if name != self.name:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module: Any) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                self.action()

            spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


def _add_names() -> None:
    """Let `diffusers.LocalDiTPipeline` and so on be found, imported when they are first used."""
    diffusers = sys.modules["diffusers"]  # it replaces itself while it is executed
    known = vars(diffusers).get("__getattr__")

    def find(name: str) -> Any:
        if name in NAMES:
            return getattr(importlib.import_module(__package__), name)
        if known is not None:
            return known(name)
        raise AttributeError(f"module 'diffusers' has no attribute {name!r}")

    # A module's own `__getattr__` (PEP 562) is asked before that of its class.
    diffusers.__getattr__ = find  # type: ignore[method-assign]


def _add_to_auto_pipelines() -> None:
    mappings = sys.modules["diffusers.pipelines.auto_pipeline"]
    for mapping, name in PIPELINES.items():
        getattr(mappings, mapping)["localdit"] = getattr(importlib.import_module(__package__), name)
