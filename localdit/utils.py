"""Build the pipeline that a `Config` names: `load_model`; and where the model in the box lies."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import config_field
from .core.parts import load_parts, load_text_encoder, locate_parts
from .errors import Field, FieldImportError, FieldNotFoundError, FieldValueError
from .sources import TEXT_ENCODER, locate

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


def load_model(
    config: Config,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> LocalDiTPipeline:
    """Build the text-to-image pipeline that `config` names, ready to run.

    `config.ckpt_path` may be a Diffusers pipeline folder, which brings all its parts and whose own
    configuration holds; a Diffusers transformer folder, likewise; or a flat `.safetensors` or `.pt`
    checkpoint, whose tensors have to agree with the sizes in `config`. The latter two are joined
    by `config.text_encoder`, `config.vae` and `config.scheduler`. Whatever can be checked without
    loading is checked first.

    Args:
        config: says what to load, and how: `offload`, `text_encoder_quantization`.
        device: by default a CUDA GPU, else Apple's MPS, else the CPU.
        dtype: of the weights, as "float32" or `torch.float32`; by default bfloat16 on a CUDA GPU
            that computes in it, else float16 on a GPU, float32 on the CPU.

    Raises:
        FileNotFoundError: if the checkpoint or a local copy of another part is missing.
        OSError: if a part has to come from the Hugging Face hub and can't be fetched; the message
            names repository and files, and how to use a local copy.
        ImportError: for quantization without bitsandbytes.
        ValueError: if a checkpoint's tensors contradict `config`, or options contradict each other.
    """
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    check_options(config, device)
    checkpoint = find_checkpoint(config.ckpt_path)
    load = _load_pipeline_folder if (checkpoint / "model_index.json").is_file() else _assemble
    with warnings.catch_warnings():
        # Older versions of Diffusers know no other name; newer ones warn of its end.
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        pipe = load(config, checkpoint, device, dtype)
    if config.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif config.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def model_in_the_box() -> Path:
    """The pipeline folder of the small model that comes with the package.

    Raises:
        FileNotFoundError: if this installation lacks it.
    """
    if not (BOX / "model_index.json").is_file():
        raise FileNotFoundError(f"{BOX} is missing: this copy of localdit has no model in it")
    return BOX


# Options


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device that is meant, by default the first there is of CUDA, MPS and the CPU.

    Raises:
        ValueError: if it is none, or PyTorch does not find it here.
    """
    import torch

    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise FieldValueError(
            "{field} is {device!r}; expected 'cpu', 'cuda', 'cuda:1' or 'mps'",
            field=Field("device"),
            device=device,
        ) from error
    missing = {
        "cuda": not torch.cuda.is_available(),
        "mps": not torch.backends.mps.is_available(),
    }
    if missing.get(resolved.type):
        raise FieldValueError(
            "{field} is {device!r}, but PyTorch finds no such device; try 'cpu'",
            field=Field("device"),
            device=str(resolved),
        )
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype that is meant, by default as `load_model` says.

    Raises:
        ValueError: if weights are not kept in it.
    """
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
    """Refuse what contradicts itself or the device.

    Raises:
        ImportError: for quantization without bitsandbytes.
        ValueError: for offloading without a GPU, or one that quantization rules out.
    """
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
    """Check that there is something of a known kind at `config.ckpt_path`; nothing is loaded.

    Raises:
        FileNotFoundError: if there is not; the message has the command that fetches the weights.
    """
    checkpoint = Path(path).expanduser()
    if not checkpoint.exists():
        raise FieldNotFoundError(
            "{field}: there is no {checkpoint}. Name a checkpoint or a Diffusers folder, or "
            "download the released weights: {command}",
            field=config_field("ckpt_path"),
            checkpoint=checkpoint,
            command=DOWNLOAD_COMMAND,
        )
    known = ("model_index.json", "config.json")
    if checkpoint.is_dir() and not any((checkpoint / name).is_file() for name in known):
        raise FieldNotFoundError(
            "{field}: the folder {checkpoint} holds neither model_index.json (a Diffusers "
            "pipeline) nor config.json (a transformer)",
            field=config_field("ckpt_path"),
            checkpoint=checkpoint,
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
    _check_agreement(config, checkpoint)
    return LocalDiTTransformer2DModel.from_single_file(
        checkpoint, torch_dtype=dtype, **config.transformer_kwargs()
    )


def _check_agreement(config: Config, checkpoint: Path) -> None:
    """Compare the architecture in `config` with what a flat checkpoint tells of its own."""
    expected = contradictions(config, checkpoint)
    if expected:
        given = ", ".join(f"{name}={getattr(config, name)!r}" for name in expected)
        wanted = ", ".join(f"{name}={value!r}" for name, value in expected.items())
        raise ValueError(
            f"{checkpoint} is of another model than the Config with {given}; "
            f"for this file it has to be Config({wanted})"
        )


def contradictions(config: Config, checkpoint: Path) -> dict[str, Any]:
    """The fields of `config` that a flat checkpoint contradicts, with its own values.

    Raises:
        ValueError: if it is damaged, or not of a LocalDiT.
    """
    from .checkpoint.layout import read_layout
    from .checkpoint.reading import CheckpointFile

    file = CheckpointFile(checkpoint)
    layout = read_layout(file.infos, str(checkpoint))
    facts = file.config | {name: fact.value for name, fact in layout.facts.items()}
    facts["use_global"] = "local_global" in layout.layer_types
    # in a file's own configuration None means that a value follows from the others
    return {
        "eps" if name == "qk_norm_eps" else name: facts[name]
        for name, value in config.transformer_kwargs().items()
        if name != "dropout" and facts.get(name) not in (None, value)
    }


# Whole pipelines


def _load_pipeline_folder(
    config: Config, folder: Path, device: torch.device, dtype: torch.dtype
) -> LocalDiTPipeline:
    from .pipelines import LocalDiTPipeline

    parts = {}
    if config.text_encoder_quantization:
        where = locate(TEXT_ENCODER, folder)
        parts["text_encoder"] = load_text_encoder(
            where, dtype, config.text_encoder_quantization, device
        )
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
