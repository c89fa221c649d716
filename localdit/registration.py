"""Names that are imported on first use, and the registration of our classes with Diffusers.

`DiffusionPipeline.from_pretrained` looks up pipelines and models by name in the module `diffusers`,
and the `AutoPipelineFor...` classes look them up in dictionaries. Neither module is imported here,
since that takes seconds. Our classes are added at once if the module is loaded, or else as soon as
it is imported.

Hidden state, all of it from `import localdit`:

- `sys.meta_path` holds one import hook per module that is not loaded yet. It is removed when the
  module has been imported.
- `diffusers.__getattr__` is replaced by a function that also knows our names.
- The three dictionaries of `diffusers.pipelines.auto_pipeline` get the key "localdit".
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


def lazy_names(package: str, homes: dict[str, str]) -> Callable[[str], Any]:
    """Return a `__getattr__` that imports the public names of a package on first use.

    Args:
        package: the package's `__name__`.
        homes: the module of the package in which each name is defined.
    """

    def getattribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{homes[name]}", package), name)

    return getattribute


def register() -> None:
    """Add our classes to Diffusers, now or when it is imported."""
    after_import("diffusers", _add_names)
    after_import("diffusers.pipelines.auto_pipeline", _add_to_auto_pipelines)


def after_import(name: str, action: Callable[[], None]) -> None:
    """Call `action` after the module `name` is imported, at once if it already is."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _AfterImport(name, action))


class _AfterImport:
    """An import hook (PEP 451) that calls `action` after one module has been executed."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name = name
        self.action = action

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the spec that another finder returns, with a loader that calls the action."""
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
    """Add `diffusers.LocalDiTPipeline` and the others, imported on first use."""
    diffusers = sys.modules["diffusers"]  # Diffusers replaces this module while executing it
    known = vars(diffusers).get("__getattr__")

    def find(name: str) -> Any:
        if name in NAMES:
            return getattr(importlib.import_module(__package__), name)
        if known is not None:
            return known(name)
        raise AttributeError(f"module 'diffusers' has no attribute {name!r}")

    # The `__getattr__` of a module (PEP 562) comes before that of its class.
    diffusers.__getattr__ = find  # type: ignore[method-assign]


def _add_to_auto_pipelines() -> None:
    """Add our pipelines to the dictionaries of the `AutoPipelineFor...` classes."""
    mappings = sys.modules["diffusers.pipelines.auto_pipeline"]
    for mapping, name in PIPELINES.items():
        getattr(mappings, mapping)["localdit"] = getattr(importlib.import_module(__package__), name)
