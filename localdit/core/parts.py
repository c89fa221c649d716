"""The parts of a pipeline beside the transformer: found and loaded.

The files of a part are in a local folder or on the Hugging Face hub. The class of a part follows
from its own configuration, so another autoencoder or text encoder needs no option.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from ..config import config_field
from ..errors import (
    Field,
    FieldNotFoundError,
    FieldOSError,
    FieldValueError,
    Setting,
)
from ..files import is_hub_name, read_json, user_path
from ..sizes import folder_with_part

if TYPE_CHECKING:
    import torch

    from ..config import Config


class Part(NamedTuple):
    """The files of a part."""

    field: str  # the field of `Config` that names the folder or the repository
    # Where the files are: in the first of these folders on the hub, in any of them in a local copy
    folders: tuple[str, str]
    config: str  # the file of the configuration
    weights: tuple[str, ...] = ()  # patterns of the weights; one of them is needed

    def files(self, folder: str) -> str:
        """Return the files in words, such as `vae/config.json and vae/*.safetensors`."""
        weights = " or ".join(f"{folder}/{name}".lstrip("/") for name in self.weights)
        return " and ".join(filter(None, [f"{folder}/{self.config}".lstrip("/"), weights]))


PARTS = {  # in the order in which they are loaded: the largest comes last
    "scheduler": Part("scheduler", ("scheduler", ""), "scheduler_config.json"),
    "vae": Part(
        "vae",
        ("vae", ""),
        "config.json",
        ("diffusion_pytorch_model*.safetensors", "*model*.bin"),
    ),
    "tokenizer": Part(
        "text_encoder",
        ("", "tokenizer"),
        "tokenizer_config.json",
        ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json"),
    ),
    "text_encoder": Part(
        "text_encoder",
        ("", "text_encoder"),
        "config.json",
        ("model*.safetensors", "*model*.bin"),
    ),
}
ENCODERS = ("tokenizer", "text_encoder", "vae")
Load = TypeVar("Load", bound=Callable[..., Any])
_ONE_AT_A_TIME = threading.RLock()  # a setting of Transformers holds for the whole process
# Models whose encoder alone, or whose text tower alone, makes the caption. Of any other text model
# the last hidden states do.
TEXT_CLASSES = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}


# Finding


def locate(part: Part, source: str | Path, local_files_only: bool = False) -> dict[str, Any]:
    """Make sure that a part exists, and return where, as arguments of `from_pretrained`.

    From a repository on the hub, only the configuration is fetched, a few hundred bytes.

    Args:
        part: one of `PARTS`.
        source: a local folder, or a repository on the hub.
        local_files_only: take files of the hub from the cache, and fetch nothing.

    Raises:
        FileNotFoundError: a local folder is missing or lacks files; a `FieldError`.
        ValueError: a local configuration is unsound.
        OSError: a repository on the hub can't be reached; a `FieldError`.
    """
    named = user_path(source)
    if named.is_dir():
        local = folder_with_part(named, "".join(part.folders))  # one of the two is empty
        for folder in part.folders:
            files = local / folder
            weights = any(any(files.glob(pattern)) for pattern in part.weights)
            if (files / part.config).is_file() and (weights or not part.weights):
                require_sound_config(files)
                return {"pretrained_model_name_or_path": str(local), "subfolder": folder}
        shared = f" for {named}, which takes them from its parent: move it to its teacher's folder"
        raise FieldNotFoundError(
            "{field}: {folder} lacks files{shared}; expected {layouts}",
            field=config_field(part.field),
            folder=local,
            shared="" if local == named else shared,
            layouts="; or ".join(map(part.files, part.folders)),
        )
    if not is_hub_name(source):
        raise FieldNotFoundError(
            "{field}: there is no folder {source}", field=config_field(part.field), source=source
        )
    folder = part.folders[0]
    with fetching(part, source):
        from huggingface_hub import hf_hub_download

        hf_hub_download(
            str(source),
            part.config,
            subfolder=folder or None,
            local_files_only=local_files_only,
        )
    return {
        "pretrained_model_name_or_path": str(source),
        "subfolder": folder,
        "local_files_only": local_files_only,
    }


@contextmanager
def fetching(part: Part, source: str | Path) -> Iterator[None]:
    """Turn the many errors of the hub's clients into one that says what to do.

    Raises:
        OSError: the source can't be fetched; a `FieldError`.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if user_path(source).is_dir():
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        folder = "/path/to/that/folder"
        raise FieldOSError(
            "{source} could not be fetched from the Hugging Face hub: {reason}. It needs {files}. "
            "Without a connection, copy these files to a local folder under the same names and "
            "{advice}",
            source=source,
            reason=f"{reason} ({type(error).__name__})",
            files=part.files(part.folders[0]),
            advice=Setting(part.field, folder, f"set Config({part.field}='{folder}')"),
        ) from error


def locate_parts(
    config: Config, absent: Collection[str] = PARTS, local_files_only: bool = False
) -> dict[str, dict[str, Any]]:
    """Return where the `absent` ones of `PARTS` are that `config` names; see `locate`."""
    return {
        name: locate(part, getattr(config, part.field), local_files_only=local_files_only)
        for name, part in PARTS.items()
        if name in absent
    }


def require_sound_config(folder: Path) -> None:
    """Refuse configurations in a part's folder that are damaged or out of all proportion.

    A model has a tensor for each of its layers at least, so its weights bound their number.
    """
    for path in sorted(folder.glob("*config.json")):
        settings = list(read_json(path).items())
        numbers = []
        while settings:  # no recursion: settings may be nested deep
            name, value = settings.pop()
            if isinstance(value, dict):
                settings += value.items()
            elif isinstance(value, list):
                settings += [(name, one) for one in value]
            elif type(value) is int and re.search("layers|blocks|timesteps", name):
                numbers.append((name, value))
        weights = sorted(folder.glob("*.safetensors")) if numbers else []
        tensors = 1000
        if weights:
            from ..checkpoint.reading import open_files

            tensors = len(open_files(weights)) or tensors
        for name, value in numbers:
            if value > (most := 1_000_000 if "timesteps" in name else tensors):
                raise FieldValueError(
                    "{path}: {field} is {value:,}; expected at most {most:,}{why}.",
                    path=path,
                    field=Field(name, f"'{name}'"),
                    value=value,
                    most=most,
                    why=f", as {path.parent} has that many tensors" if weights else "",
                )


# Loading


@contextmanager
def unattended() -> Iterator[None]:
    """Let Transformers refuse code in a folder where it would ask on standard input to run it."""
    from transformers import dynamic_module_utils as dynamic

    with _ONE_AT_A_TIME:
        seconds = dynamic.TIME_OUT_REMOTE_CODE
        dynamic.TIME_OUT_REMOTE_CODE = 0  # no time to answer
        try:
            yield
        finally:
            dynamic.TIME_OUT_REMOTE_CODE = seconds


def names_folder(load: Load) -> Load:
    """Let every error of a library while it loads a part name the part's folder."""

    @wraps(load)
    def named(where: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        try:
            return load(where, *args, **options)
        except (OSError, ImportError, MemoryError):  # they are not about the contents
            raise
        except Exception as error:
            source = where["pretrained_model_name_or_path"]
            if source in str(error) or "OutOfMemory" in type(error).__name__:
                raise
            raise ValueError(
                f"{Path(source) / where['subfolder']} can't be loaded ({type(error).__name__}: "
                f"{error}). If its files are damaged or do not fit each other, fetch it again."
            ) from error

    return cast("Load", named)


def load_parts(
    config: Config,
    where: Mapping[str, dict[str, Any]],
    device: torch.device,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Load the parts that `locate_parts` found."""
    quantization = config.text_encoder_quantization
    loaders = {
        "scheduler": load_scheduler,
        "vae": lambda at: load_vae(at, dtype),
        "tokenizer": load_tokenizer,
        "text_encoder": lambda at: load_text_encoder(at, dtype, quantization, device),
    }
    parts = {}
    for name, part in PARTS.items():
        if name in where:
            with fetching(part, getattr(config, part.field)):
                parts[name] = loaders[name](where[name])
    return parts


@names_folder
def load_scheduler(where: Mapping[str, Any]) -> Any:
    """Load the scheduler of Diffusers that a configuration names; DPM-Solver++ if it names none."""
    import diffusers

    kind: Any = getattr(diffusers, str(scheduler_config(where).get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        kind = diffusers.DPMSolverMultistepScheduler
    return kind.from_pretrained(**where)


@names_folder
def load_tokenizer(where: Mapping[str, Any]) -> Any:
    """Load a tokenizer; one that needs code of its folder is refused, and nobody is asked."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(**where, trust_remote_code=False)


def scheduler_config(where: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a scheduler that `locate` found."""
    folder = Path(where["pretrained_model_name_or_path"])
    if folder.is_dir():
        return read_json(folder / where["subfolder"] / PARTS["scheduler"].config)
    from diffusers import DPMSolverMultistepScheduler

    return dict(DPMSolverMultistepScheduler.load_config(**where))


def vae_config(where: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of an autoencoder; no weights are read."""
    from diffusers import AutoencoderKL

    return dict(AutoencoderKL.load_config(**where))


@names_folder
def load_vae(where: Mapping[str, Any], dtype: torch.dtype | None) -> Any:
    """Load an autoencoder of the class that its configuration names."""
    import diffusers

    name = vae_config(where).get("_class_name", "AutoencoderKL")
    kind = getattr(diffusers, name, None) if name.startswith("Autoencoder") else None
    if kind is None:
        raise ValueError(
            f"{where['pretrained_model_name_or_path']}: {name!r} is not an autoencoder of "
            "Diffusers; expected AutoencoderKL, AutoencoderDC or AutoencoderTiny."
        )
    return load_whole(kind, **where, torch_dtype=dtype)


@names_folder
def text_encoder_class(where: Mapping[str, Any]) -> Any:
    """Return the Transformers class that loads a text encoder; no weights are read."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(**where, trust_remote_code=False)
    name = TEXT_CLASSES.get(config.model_type)
    return (
        getattr(transformers, name) if name else transformers.AutoModel._model_mapping[type(config)]
    )


@names_folder
def load_text_encoder(
    where: Mapping[str, Any],
    dtype: torch.dtype | None,
    quantization: str | None = None,
    device: torch.device | None = None,
) -> Any:
    """Load a text encoder of the class that its configuration names.

    Args:
        where: arguments of `from_pretrained`.
        dtype: dtype of the weights, or of the computation if they are quantized; None keeps it.
        quantization: "8bit", "4bit" or None.
        device: where quantized weights go.
    """
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {}
    if quantization == "8bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif quantization == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    if options:
        options["device_map"] = {"": device}
    return load_whole(text_encoder_class(where), **where, torch_dtype=dtype, **options)


def load_whole(kind: Any, **where: Any) -> Any:
    """Load a model, and refuse it unless it has all of its weights, with finite values."""
    if "quantization_config" in where:  # quantized weights have other names
        return kind.from_pretrained(**where)
    model, info = kind.from_pretrained(**where, output_loading_info=True)
    folder = Path(where["pretrained_model_name_or_path"]) / where.get("subfolder", "")
    require_whole(model, folder, info["missing_keys"])
    return model


def require_whole(model: torch.nn.Module, folder: Path, missing: Collection[str] = ()) -> None:
    """Refuse a model some of whose weights were not in its folder, or are not finite."""
    from ..checkpoint.reading import few, require_finite

    if missing:
        raise ValueError(f"{folder} lacks the weights {few(sorted(missing))}. Fetch it again.")
    for name, parameter in model.named_parameters():
        require_finite(folder, name, parameter)
