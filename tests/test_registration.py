import importlib
import subprocess
import sys

import diffusers
import pytest

import localdit
from localdit.pipelines import (
    LocalDiTImg2ImgPipeline,
    LocalDiTInpaintPipeline,
    LocalDiTPipeline,
)
from localdit.registration import NAMES, after_import

TASKS = {
    "AutoPipelineForText2Image": LocalDiTPipeline,
    "AutoPipelineForImage2Image": LocalDiTImg2ImgPipeline,
    "AutoPipelineForInpainting": LocalDiTInpaintPipeline,
}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that replaces itself, as Diffusers does, and can fail to import."""
    (tmp_path / "to_come.py").write_text(
        "import os, sys, types\n"
        "if os.environ.get('TO_COME') == 'fails': raise ImportError('not now')\n"
        "sys.modules[__name__] = types.SimpleNamespace(value=1, spec=__spec__)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    yield "to_come"
    sys.modules.pop("to_come", None)


def test_an_action_runs_once_when_its_module_is_imported(module):
    seen = []
    finders = len(sys.meta_path)
    after_import(module, lambda: seen.append(sys.modules[module].value))
    assert not seen
    imported = importlib.import_module(module)
    assert seen == [1]
    assert imported.spec.origin.endswith("to_come.py")
    assert len(sys.meta_path) == finders
    del sys.modules[module]
    importlib.import_module(module)
    assert seen == [1]


def test_an_action_for_an_imported_module_runs_at_once(module):
    importlib.import_module(module)
    seen = []
    after_import(module, lambda: seen.append(1))
    assert seen == [1]


def test_an_action_waits_on_after_a_failed_import(module, monkeypatch):
    seen = []
    after_import(module, lambda: seen.append(1))
    monkeypatch.setenv("TO_COME", "fails")
    with pytest.raises(ImportError, match="not now"):
        importlib.import_module(module)
    assert not seen
    monkeypatch.delenv("TO_COME")
    importlib.import_module(module)
    assert seen == [1]


def test_a_missing_module_raises_the_usual_error(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    after_import("there_is_no_such_module", lambda: 1 / 0)
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such_module"):
        importlib.import_module("there_is_no_such_module")


def test_diffusers_has_our_names_and_no_others():
    for name in NAMES:
        assert getattr(diffusers, name) is getattr(localdit, name)
    assert not hasattr(diffusers, "LocalDiTNothing")
    assert diffusers.PixArtAlphaPipeline.__name__ == "PixArtAlphaPipeline"


@pytest.fixture
def automatic():
    """Skip where Diffusers' automatic pipelines need a newer Transformers than is installed."""
    try:
        from diffusers import AutoPipelineForText2Image  # noqa: F401
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[-1])


# Each order of imports needs a process of its own.
CHEAP = (
    "import sys, localdit; assert not {'torch', 'diffusers', 'localdit.pipelines'} & {*sys.modules}"
)
ORDERS = {
    "localdit first": f"{CHEAP}\nimport diffusers",
    "diffusers first": "import diffusers\nimport localdit",
    "automatic pipelines first": "from diffusers import AutoPipelineForText2Image\nimport localdit",
}
LOADING = """
from localdit.utils import model_in_the_box
pipe = diffusers.DiffusionPipeline.from_pretrained(model_in_the_box())
made = [pipe]
for task in ("Text2Image", "Image2Image", "Inpainting"):
    automatic = getattr(diffusers, f"AutoPipelineFor{task}")
    made += [automatic.from_pretrained(model_in_the_box()), automatic.from_pipe(pipe)]
made.append(diffusers.AutoModel.from_pretrained(str(model_in_the_box() / "transformer")))
print(*(type(one).__name__ for one in made))
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_diffusers_classes_load_our_folders_in_each_order_of_imports(order, automatic):
    code = f"{ORDERS[order]}\nimport diffusers\n{LOADING}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    expected = [LocalDiTPipeline.__name__]
    expected += [kind.__name__ for kind in TASKS.values() for _ in range(2)]
    assert run.stdout.split() == [*expected, "LocalDiTTransformer2DModel"]


@pytest.mark.parametrize("task", TASKS)
def test_automatic_pipelines_make_ours_from_a_pipeline(task, automatic):
    from tests.tiny import tiny_pipeline

    pipe = tiny_pipeline()
    made = getattr(diffusers, task).from_pipe(pipe)
    assert type(made) is TASKS[task]
    assert all(made.components[name] is part for name, part in pipe.components.items())
