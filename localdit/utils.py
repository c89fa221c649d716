"""Build the pipeline that a `Config` names: `load_model`; and where the model in the box lies."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    device = _resolve_device(device)
    dtype = _resolve_dtype(dtype, device)
    _check_options(config, device)
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


def _resolve_device(device: str | torch.device | None) -> torch.device:
    import torch

    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device is {device!r}; expected 'cpu', 'cuda', 'cuda:1', 'mps'"
        ) from error
    missing = {
        "cuda": not torch.cuda.is_available(),
        "mps": not torch.backends.mps.is_available(),
    }
    if missing.get(resolved.type):
        raise ValueError(f"device is {str(resolved)!r}, but PyTorch finds none here; try 'cpu'")
    return resolved


def _resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    import torch

    if dtype is None:
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.float32 if device.type == "cpu" else torch.float16
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype is {dtype!r}; expected 'float32', 'bfloat16' or 'float16'")
    return resolved


def _check_options(config: Config, device: torch.device) -> None:
    if config.offload and device.type == "cpu":
        raise ValueError(
            f"Config.offload is {config.offload!r}, which moves parts to a GPU and back, but the "
            "device is the CPU; set it to None"
        )
    if config.text_encoder_quantization is None:
        return
    if config.offload == "sequential":
        raise ValueError(
            "Config.offload='sequential' can't move a quantized text encoder; use 'model' or None"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"Config.text_encoder_quantization={config.text_encoder_quantization!r} needs "
            "bitsandbytes: pip install bitsandbytes"
        )


# The checkpoint


def find_checkpoint(path: str | Path) -> Path:
    """Check that there is something of a known kind at `config.ckpt_path`; nothing is loaded.

    Raises:
        FileNotFoundError: if there is not; the message has the command that fetches the weights.
    """
    checkpoint = Path(path).expanduser()
    if not checkpoint.exists():
        raise FileNotFoundError(
            f"Config.ckpt_path: there is no {checkpoint}. Set it to a checkpoint or a Diffusers "
            f"folder, or fetch the released weights with: {DOWNLOAD_COMMAND}"
        )
    known = ("model_index.json", "config.json")
    if checkpoint.is_dir() and not any((checkpoint / name).is_file() for name in known):
        raise FileNotFoundError(
            f"Config.ckpt_path: the folder {checkpoint} holds neither model_index.json (a "
            "Diffusers pipeline) nor config.json (a transformer)"
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
    return LocalDiTTransformer2DModel.from_single_file(
        checkpoint, torch_dtype=dtype, **config.transformer_kwargs()
    )


# The other parts


@dataclass(frozen=True)
class _Part:
    """A part that is not in the checkpoint, and where its files lie.

    On the hub it is expected in the first of the folders, in a local copy in any of them.
    """

    field: str
    folders: tuple[str, ...]
    config: str
    weights: tuple[str, ...] = ()  # one of them is needed


_TEXT_ENCODER = _Part(
    "text_encoder", ("", "text_encoder"), "config.json", ("model*.safetensors", "*model*.bin")
)
_TOKENIZER = _Part(
    "text_encoder", ("", "tokenizer"), "tokenizer_config.json", ("tokenizer.json", "spiece.model")
)
_VAE = _Part(
    "vae", ("vae", ""), "config.json", ("diffusion_pytorch_model*.safetensors", "*model*.bin")
)
_SCHEDULER = _Part("scheduler", ("scheduler", ""), "scheduler_config.json")


def _wanted(part: _Part, folder: str) -> str:
    """The files of a part in words, as `vae/config.json and vae/*.safetensors`."""
    weights = [" or ".join(f"{folder}/{name}".lstrip("/") for name in part.weights)]
    return " and ".join([f"{folder}/{part.config}".lstrip("/"), *filter(None, weights)])


def _locate(part: _Part, source: str | Path) -> dict[str, str]:
    """Where a part is, as arguments of `from_pretrained`, having made sure that it is there.

    Of a repository on the hub its configuration is fetched for that, a few hundred bytes.
    """
    local = Path(source).expanduser()
    if local.is_dir():
        for folder in part.folders:
            files = local / folder
            weights = [file for pattern in part.weights for file in files.glob(pattern)]
            if (files / part.config).is_file() and (weights or not part.weights):
                return {"pretrained_model_name_or_path": str(local), "subfolder": folder}
        layouts = "; or ".join(_wanted(part, folder) for folder in part.folders)
        raise FileNotFoundError(f"Config.{part.field}: {local} lacks files; expected {layouts}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source)[0] in ".~":
        raise FileNotFoundError(f"Config.{part.field}: there is no folder {source}")
    folder = part.folders[0]
    with _fetching(part, source):
        from huggingface_hub import hf_hub_download

        hf_hub_download(str(source), part.config, subfolder=folder or None)
    return {"pretrained_model_name_or_path": str(source), "subfolder": folder}


@contextmanager
def _fetching(part: _Part, source: str | Path) -> Iterator[None]:
    """Turn the many errors of the hub's clients into one that helps."""
    try:
        yield
    except (OSError, ValueError) as error:
        if Path(source).expanduser().is_dir():
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise OSError(
            f"{source} could not be fetched from the Hugging Face hub: {reason} "
            f"({type(error).__name__}). Wanted from it: {_wanted(part, part.folders[0])}. "
            "Without a connection, copy these files to a folder here, under the same names, and "
            f"set Config({part.field}='/path/to/that/folder')"
        ) from error


def _load_text_encoder(
    config: Config, where: dict[str, str], device: torch.device, dtype: torch.dtype
) -> Any:
    from transformers import BitsAndBytesConfig, T5EncoderModel

    options: dict[str, Any] = {}
    if config.text_encoder_quantization == "8bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif config.text_encoder_quantization == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    if options:
        options["device_map"] = {"": device}
    return T5EncoderModel.from_pretrained(**where, torch_dtype=dtype, **options)


# Whole pipelines


def _load_pipeline_folder(
    config: Config, folder: Path, device: torch.device, dtype: torch.dtype
) -> LocalDiTPipeline:
    from .pipelines import LocalDiTPipeline

    parts = {}
    if config.text_encoder_quantization:
        where = _locate(_TEXT_ENCODER, folder)
        parts["text_encoder"] = _load_text_encoder(config, where, device, dtype)
    return LocalDiTPipeline.from_pretrained(
        folder, torch_dtype=dtype, use_safetensors=True, **parts
    )


def _assemble(
    config: Config, checkpoint: Path, device: torch.device, dtype: torch.dtype
) -> LocalDiTPipeline:
    """Join a transformer with the parts that `config` names; the largest comes last."""
    sources = {
        _SCHEDULER: config.scheduler,
        _VAE: config.vae,
        _TOKENIZER: config.text_encoder,
        _TEXT_ENCODER: config.text_encoder,
    }
    where = {part: _locate(part, source) for part, source in sources.items()}

    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
    from transformers import AutoTokenizer

    from .pipelines import LocalDiTPipeline

    transformer = _load_transformer(config, checkpoint, dtype)
    scheduler = DPMSolverMultistepScheduler.from_pretrained(**where[_SCHEDULER])
    with _fetching(_VAE, config.vae):
        vae = AutoencoderKL.from_pretrained(**where[_VAE], torch_dtype=dtype)
    with _fetching(_TOKENIZER, config.text_encoder):
        tokenizer = AutoTokenizer.from_pretrained(**where[_TOKENIZER])
    with _fetching(_TEXT_ENCODER, config.text_encoder):
        text_encoder = _load_text_encoder(config, where[_TEXT_ENCODER], device, dtype)
    return LocalDiTPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=scheduler,
    )
