"""Load the pipeline that a `Config` names, and find the model in the box."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import INDEX, config_field, part_source
from .core.parts import (
    PARTS,
    load_parts,
    load_text_encoder,
    locate,
    locate_parts,
    scheduler_config,
)
from .core.samplers import check_sampler, make_sampler
from .errors import Field, FieldImportError, FieldNotFoundError, FieldValueError
from .files import lora_note, user_path

__all__ = ["load_model", "model_in_the_box"]

if TYPE_CHECKING:
    import torch

    from .config import Config
    from .models import LocalDiTTransformer2DModel
    from .pipelines import LocalDiTPipeline

RELEASED_WEIGHTS = (
    "https://huggingface.co/DATAGRID-research/DATAGRID-Local-Attention-DiT-v1.0.0-0.52B"
    "/resolve/main/LocalDiT-1024.pt"
)
DOWNLOAD_COMMAND = f"wget {RELEASED_WEIGHTS} -P output/"
BOX = Path(__file__).resolve().parent / "box"
FEW_STEPS = "few_steps"  # the student, within the folder of its teacher


def load_model(
    config: Config,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> LocalDiTPipeline:
    """Load the text-to-image pipeline that `config` names, ready to run.

    `config.ckpt_path` is one of:

    - a Diffusers pipeline folder. It has all parts, and its own configuration applies. A text
      encoder, VAE or scheduler that was given to `config` replaces its own;
    - a Diffusers transformer folder. Its own configuration applies, too. The other parts are
      `config.text_encoder`, `config.vae` and `config.scheduler`;
    - a flat `.safetensors` or `.pt` checkpoint. Its tensors must agree with the sizes in `config`,
      which names the other parts.

    `config.sampler` replaces the scheduler. Everything that can be checked without loading is
    checked first.

    Args:
        config: names the parts, and says how to load them: `offload`, `text_encoder_quantization`.
        device: by default a CUDA GPU, else Apple's MPS, else the CPU.
        dtype: dtype of the weights, as "float32" or `torch.float32`; by default bfloat16 on a CUDA
            GPU that supports it, float16 on other GPUs, float32 on the CPU.

    Raises:
        FileNotFoundError: the checkpoint or a local copy of another part is missing.
        OSError: a part can't be fetched from the Hugging Face hub; the message names the repository
            and the files, and says how to use a local copy.
        ImportError: quantization is set, but bitsandbytes is not installed.
        ValueError: a checkpoint's tensors contradict `config`, options contradict each other, or
            the sampler does not suit the model.
    """
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    check_options(config, device)
    checkpoint = find_checkpoint(config.ckpt_path)
    whole = (checkpoint / INDEX).is_file()
    if config.sampler is not None:
        source = part_source(config, "scheduler", checkpoint)
        check_sampler(config.sampler, scheduler_config(locate(PARTS["scheduler"], source)))
    load = _load_pipeline_folder if whole else _assemble
    with warnings.catch_warnings():
        # Older versions of Diffusers have only this name; newer ones warn that it will go.
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        pipe = load(config, checkpoint, device, dtype)
    if config.sampler is not None:
        pipe.scheduler = make_sampler(config.sampler, pipe.scheduler)
    if config.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif config.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def model_in_the_box(few_steps: bool = False) -> Path:
    """Return the pipeline folder of the small model that comes with the package.

    Args:
        few_steps: the student that was distilled from it, which draws in 4 steps without guidance.
            Its folder shares parts. The pipelines of localdit and the `AutoPipelineFor...` classes
            load it, `DiffusionPipeline` does not.

    Raises:
        FileNotFoundError: this installation lacks it.
    """
    folder = BOX / FEW_STEPS if few_steps else BOX
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} is missing: this copy of localdit has no model in it")
    return folder


# Options


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return a device, by default the first available one of CUDA, MPS and the CPU."""
    import torch

    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    resolved: torch.device | None
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = None
    found = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }
    if resolved is None or resolved.type not in found:
        raise FieldValueError(
            "{field} is {device!r}; expected 'cpu', 'cuda', 'cuda:1' or 'mps'",
            field=Field("device"),
            device=str(device),
        )
    if (resolved.index or 0) >= found[resolved.type]:
        raise FieldValueError(
            "{field} is {device!r}, but PyTorch finds no such device; try 'cpu'",
            field=Field("device"),
            device=str(resolved),
        )
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return a dtype of weights; the default is that of `load_model`."""
    import torch

    if dtype is None:
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.float32 if device.type == "cpu" else torch.float16
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in (torch.float32, torch.bfloat16, torch.float16):
        raise FieldValueError(
            "{field} is {dtype!r}; expected 'float32', 'bfloat16' or 'float16'",
            field=Field("dtype"),
            dtype=dtype,
        )
    return resolved


def check_options(config: Config, device: torch.device) -> None:
    """Refuse options that contradict each other or the device."""
    if config.offload and device.type == "cpu":
        raise FieldValueError(
            "{field} is {value!r}, which moves parts to a GPU and back, but the device is the CPU; "
            "leave it out",
            field=config_field("offload"),
            value=config.offload,
        )
    if config.text_encoder_quantization is None:
        return
    if config.offload == "sequential":
        raise FieldValueError(
            "{field} is 'sequential', which can't move a quantized text encoder; use 'model' or "
            "leave it out",
            field=config_field("offload"),
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise FieldImportError(
            "{field}: {value!r} needs bitsandbytes: pip install bitsandbytes",
            field=config_field("text_encoder_quantization"),
            value=config.text_encoder_quantization,
        )


# The checkpoint


def find_checkpoint(path: str | Path) -> Path:
    """Check that a path is a checkpoint file or a Diffusers folder, without loading it."""
    checkpoint = user_path(path)
    if not checkpoint.exists():
        raise FieldNotFoundError(
            "{field}: there is no {checkpoint}. Name a checkpoint or a Diffusers folder, or "
            "download the released weights: {command}",
            field=config_field("ckpt_path"),
            checkpoint=checkpoint,
            command=DOWNLOAD_COMMAND,
        )
    known = (INDEX, "config.json")
    if checkpoint.is_dir() and not any((checkpoint / name).is_file() for name in known):
        raise FieldNotFoundError(
            "{field}: the folder {checkpoint} holds neither model_index.json (a Diffusers "
            "pipeline) nor config.json (a transformer).{note}",
            field=config_field("ckpt_path"),
            checkpoint=checkpoint,
            note=lora_note(checkpoint),
        )
    return checkpoint


def _load_transformer(
    config: Config, checkpoint: Path, dtype: torch.dtype
) -> LocalDiTTransformer2DModel:
    from .models import LocalDiTTransformer2DModel

    if checkpoint.is_dir():
        return LocalDiTTransformer2DModel.from_pretrained(
            checkpoint, torch_dtype=dtype, use_safetensors=True
        )
    if expected := contradictions(config, checkpoint):
        given = ", ".join(f"{name}={getattr(config, name)!r}" for name in expected)
        wanted = ", ".join(f"{name}={value!r}" for name, value in expected.items())
        raise ValueError(
            f"{checkpoint} is of another model than the Config with {given}; "
            f"for this file it has to be Config({wanted})"
        )
    return LocalDiTTransformer2DModel.from_single_file(
        checkpoint, torch_dtype=dtype, **config.transformer_kwargs()
    )


def contradictions(config: Config, checkpoint: Path) -> dict[str, Any]:
    """Return the fields of `config` that a flat checkpoint contradicts, with the file's values."""
    from .checkpoint.layout import read_layout
    from .checkpoint.reading import CheckpointFile

    file = CheckpointFile(checkpoint)
    layout = read_layout(file.infos, str(checkpoint))
    facts = file.config | {name: fact.value for name, fact in layout.facts.items()}
    facts["use_global"] = "local_global" in layout.layer_types
    # None in a file's own configuration means that the value follows from the others.
    return {
        "eps" if name == "qk_norm_eps" else name: facts[name]
        for name, value in config.transformer_kwargs().items()
        if name != "dropout" and facts.get(name) not in (None, value)
    }


# The pipeline


def _load_pipeline_folder(
    config: Config, folder: Path, device: torch.device, dtype: torch.dtype
) -> LocalDiTPipeline:
    """Load a pipeline from its folder, with the parts that `config` names instead of its own."""
    replaced = [name for name, part in PARTS.items()
                if part_source(config, part.field, folder) != folder]  # fmt: skip
    where = locate_parts(config, replaced)
    from .pipelines import LocalDiTPipeline

    parts = load_parts(config, where, device, dtype)
    quantization = config.text_encoder_quantization
    if quantization and "text_encoder" not in parts:
        where = locate(PARTS["text_encoder"], folder)
        parts["text_encoder"] = load_text_encoder(where, dtype, quantization, device)
    return LocalDiTPipeline.from_pretrained(
        folder, torch_dtype=dtype, use_safetensors=True, **parts
    )


def _assemble(
    config: Config, checkpoint: Path, device: torch.device, dtype: torch.dtype
) -> LocalDiTPipeline:
    """Join a transformer with the parts that `config` names."""
    where = locate_parts(config)
    from .pipelines import LocalDiTPipeline

    transformer = _load_transformer(config, checkpoint, dtype)
    return LocalDiTPipeline(transformer=transformer, **load_parts(config, where, device, dtype))
