import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from localdit.training.processes import make_accelerator
from localdit.training.sharding import (
    gather_shards,
    load_model_state,
    local,
    model_state,
    named_parameters,
    plain_name,
    shard_like,
    shard_of,
    unwrap,
    whole,
    whole_of,
)
from tests.tiny import tiny_components

ROOT = Path(__file__).parents[2]
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LocalDiTBlock",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def accelerate_knows_fsdp2():
    from accelerate.utils import FullyShardedDataParallelPlugin

    return "fsdp_version" in FullyShardedDataParallelPlugin.__dataclass_fields__


@pytest.fixture
def transformer():
    return tiny_components()["transformer"]


@pytest.fixture
def mesh(tmp_path):
    """A mesh of this process alone."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_plain_tensor_is_whole_and_local():
    tensor = torch.randn(3, 2)
    assert whole(tensor) is tensor
    assert local(tensor) is tensor
    assert whole_of(tensor, tensor) is tensor


def test_a_sharded_tensor_comes_back_whole(mesh):
    full = torch.randn(5, 2)
    sharded = distribute_tensor(full, mesh, [Shard(0)])
    again = shard_like(full, sharded)
    assert again.placements == sharded.placements
    assert torch.equal(whole(again), full)
    assert torch.equal(whole_of(local(sharded), sharded), full)


@pytest.mark.parametrize(("rank", "rows"), [(0, [0, 1]), (1, [2, 3]), (2, [4]), (3, [])])
def test_shards_are_cut_as_pytorch_cuts_them(mesh, monkeypatch, rank, rows):
    full = torch.arange(10.0).view(5, 2)
    parameter = distribute_tensor(full, mesh, [Shard(0)])
    monkeypatch.setattr(type(mesh), "size", lambda self, dim=None: 4)
    monkeypatch.setattr(type(mesh), "get_coordinate", lambda self: [rank])
    assert torch.equal(shard_of(full, parameter), full[rows])


def test_a_shard_is_a_copy(mesh):
    full = torch.zeros(4)
    for parameter in (torch.zeros(4), distribute_tensor(torch.zeros(4), mesh, [Shard(0)])):
        local(shard_like(full, parameter)).add_(1)
    assert not full.any()


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\) does not fit .* shape \(4,\)"):
        shard_of(torch.zeros(3), torch.zeros(4))


def test_names_of_wrappers_are_removed(transformer):
    compiled = torch.compile(transformer)
    assert unwrap(compiled) is transformer
    assert list(dict(named_parameters(compiled))) == list(dict(transformer.named_parameters()))
    assert plain_name("blocks.0._orig_mod._checkpoint_wrapped_module.ff.bias") == "blocks.0.ff.bias"


def test_model_state_is_a_copy_that_loads(transformer):
    state = model_state(transformer)
    assert state.keys() == transformer.state_dict().keys()
    transformer.proj_out.bias.data += 1
    assert not torch.equal(state["proj_out.bias"], transformer.proj_out.bias)
    load_model_state(transformer, state)
    assert torch.equal(state["proj_out.bias"], transformer.proj_out.bias)


def test_the_state_of_another_model_is_refused(transformer):
    state = model_state(transformer)
    state["proj_out.weight_"] = state.pop("proj_out.weight")
    with pytest.raises(ValueError, match=r"1 names are missing \(proj_out.weight\), 1 are unknown"):
        load_model_state(transformer, state)


def test_a_weight_of_another_shape_is_named(transformer):
    state = model_state(transformer) | {"proj_out.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"proj_out.bias: .*shape \(3,\)"):
        load_model_state(transformer, state)


def test_averages_are_gathered_by_name(transformer):
    shards = {name: 2 * local(p).detach() for name, p in named_parameters(transformer)}
    doubled = gather_shards(shards, transformer)
    assert torch.equal(doubled["proj_out.weight"], 2 * transformer.proj_out.weight)


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch):
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState()  # alone, before the environment says that there are two
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes were started, but this one sees 1"):
        make_accelerator(batch_size=1, gradient_clip=1.0)
    AcceleratorState._reset_state(reset_partial_state=True)


class Runs:
    """Runs of `distributed_run.py`, each in processes and a folder of its own."""

    def __init__(self, root):
        self.root = root

    def __call__(self, processes, source="-", steps=2, **environment):
        folder = self.root / f"run{len(list(self.root.iterdir()))}"
        folder.mkdir()
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
            launcher.append(str(processes))
        script = [str(Path(__file__).with_name("distributed_run.py")), str(source), str(folder)]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment
        done = subprocess.run(
            [*launcher, *script, str(steps)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def alone(run):
    return run(1)


def told(folder):
    return json.loads((folder / "told.json").read_text())


def require_same_state(folder, other):
    for name in ("model", "optimizer"):
        one, two = (load_file(path / f"{name}.safetensors") for path in (folder, other))
        assert one.keys() == two.keys()
        assert [key for key in one if not torch.equal(one[key], two[key])] == []


def require_close_state(folder, other):
    """The averaged gradients agree to rounding.

    The weights agree less well: Adam divides by gradients of which some are nearly zero.
    """
    one, two = (load_file(path / "optimizer.safetensors") for path in (folder, other))
    averages = [key for key in one if key.endswith(".exp_avg")]
    largest = max(two[key].abs().max() for key in averages)
    assert max((one[key] - two[key]).abs().max() for key in averages) < 1e-5 * largest
    one, two = (load_file(path / "model.safetensors") for path in (folder, other))
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5


needs_fsdp2 = pytest.mark.skipif(
    not accelerate_knows_fsdp2(), reason="this version of Accelerate has no FSDP2"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("DistributedDataParallel", {}),
        pytest.param("FSDPLocalDiTTransformer2DModel", FSDP2, marks=needs_fsdp2),
    ],
)
def test_state_passes_between_one_process_and_two(run, alone, kind, engine):
    two = run(2, **engine)
    assert told(two) | {"norms": 0} == {"processes": 2, "norms": 0, "kind": kind}
    torch.testing.assert_close(told(two)["norms"], told(alone)["norms"], rtol=1e-5, atol=0)
    require_close_state(two, alone)
    doubled = load_file(two / "doubled.safetensors")
    weights = load_file(two / "model.safetensors")
    assert all(torch.equal(doubled[name], 2 * weights[name]) for name in doubled)

    require_same_state(run(2, alone, steps=0, **engine), alone)
    require_same_state(run(1, two, steps=0), two)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "engine"), [(2, {}), (3, {}), pytest.param(3, FSDP2, marks=needs_fsdp2)]
)
def test_resumed_processes_reach_the_same_bits(run, processes, engine):
    half = run(processes, steps=2, **engine)
    require_same_state(run(processes, half, **engine), run(processes, steps=4, **engine))


@pytest.mark.slow
def test_deepspeed_passes_state_to_one_process_and_back(run, alone):
    pytest.importorskip("deepspeed")
    zero = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "DS_ACCELERATOR": "cpu",
    }
    two = run(2, **zero)
    assert told(two)["kind"] == "DeepSpeedEngine"
    require_close_state(two, alone)
    require_same_state(run(2, alone, steps=0, **zero), alone)
    require_same_state(run(1, two, steps=0), two)
