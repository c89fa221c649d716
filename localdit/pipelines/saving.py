"""Loading and saving of pipelines: folders with a model card, single files, LoRA, the hub."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.utils import USE_PEFT_BACKEND
from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, create_repo
from huggingface_hub.utils import EntryNotFoundError, HFValidationError

from ..checkpoint.loading import bare, require_known, require_savable
from ..checkpoint.reading import open_files, weights_library
from ..config import INDEX, Config
from ..core.parts import (
    ENCODERS,
    PARTS,
    load_parts,
    locate,
    locate_parts,
    require_sound_config,
    require_whole,
    unattended,
)
from ..core.samplers import read_settings
from ..files import (
    is_hub_name,
    lora_note,
    read_json,
    updated_folder,
    user_path,
    write_errors,
    write_json,
)
from ..models.transformer import LocalDiTTransformer2DModel
from ..sizes import folder_with_part, pipeline_around
from . import lora
from .lora import Tensors
from .model_card import make_model_card

if TYPE_CHECKING:
    from typing_extensions import Self


CARD = "README.md"
CODE = "pipeline_localdit"
CODE_TEXT = '''"""For `trust_remote_code=True`: these pipelines need localdit to be installed."""

from localdit import LocalDiTImg2ImgPipeline, LocalDiTInpaintPipeline, LocalDiTPipeline
'''

# The library and class that a folder names for the transformer; `localdit.registration` adds the
# class to Diffusers. If the folder named localdit, Diffusers would look for code on the hub.
TRANSFORMER = ["diffusers", "LocalDiTTransformer2DModel"]

# An attribute that each component has, even if it is wrapped, and what messages call it.
KINDS = {
    "transformer": ("set_sample_size", "a LocalDiTTransformer2DModel"),
    "scheduler": ("step", "a scheduler of Diffusers that samples by `step`"),
    "vae": ("decode", "an autoencoder of Diffusers"),
    "text_encoder": ("config", "a text model of Transformers"),
}


class SavedPipeline(SanaLoraLoaderMixin, DiffusionPipeline):
    """Loading and saving of a pipeline; sampling is in `LocalDiTBasePipeline`.

    Diffusers' LoRA loader for Sana is the one that handles a transformer and nothing else. The
    methods here also refuse files that are no LoRA of this transformer, with the reason, and save
    an adapter with its settings. Adapters of text encoders are not supported.
    """

    def require_parts(self, user: str, *names: str) -> None:
        """Refuse components that `user`, such as "inference", lacks or can't use.

        Raises:
            TypeError: if a component is not of its kind.
            ValueError: if one of `names` is missing.
        """
        for name, (attribute, expected) in KINDS.items():
            part = getattr(self, name)
            if part is None and name in names:
                raise ValueError(
                    f"The pipeline has no {name}, which {user} needs: load it, and set pipe.{name}."
                )
            if part is not None and not hasattr(part, attribute):
                raise TypeError(
                    f"The pipeline's {name} is a {type(part).__name__}; expected {expected}. Set "
                    f"pipe.{name} to one."
                )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        *,
        remote_code: bool = False,
        license: str = "apache-2.0",
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the pipeline as a folder, with a model card if the folder has none.

        Earlier weights of the same variant in the folder are replaced, once these are written.

        Args:
            save_directory: the folder, created if necessary.
            safe_serialization: write safetensors, not pickles.
            variant: part of the names of the weights, as in `model.fp16.safetensors`.
            max_shard_size: weights above it are split; bytes, or a string such as "2GB".
            push_to_hub: upload the folder as well.
            remote_code: add a Python file that imports localdit, and name it as the pipeline's
                code. `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` then works
                without `import localdit`. The folder always has to be trusted, and the
                `AutoPipelineFor...` classes cannot read it. The pipelines of localdit load it as
                any other folder.
            license: licence of the weights, for the card; by default that of LocalDiT.
            repo_id: repository to upload to, by default one with the folder's name in the user's
                namespace; this and the following arguments are for `push_to_hub`.
            commit_message, private, token, create_pr: as in Diffusers.
            **kwargs: as in Diffusers.

        Raises:
            OSError: if a file can't be written.
            TypeError: for an unknown argument.
            ValueError: if transformer or scheduler are missing, or a part has adapters, or its
                weights are elsewhere or were replaced.
        """
        known = inspect.signature(super().save_pretrained).parameters
        require_known("save_pretrained", kwargs, known)
        self.require_parts("save_pretrained", "transformer", "scheduler")
        for part in self.components.values():
            if isinstance(part, torch.nn.Module):
                require_savable(bare(part))
        folder = user_path(save_directory)
        with updated_folder(folder, partial(weights_library, variant=variant)) as unfinished:
            super().save_pretrained(
                str(unfinished),
                safe_serialization=safe_serialization,
                variant=variant,
                max_shard_size=max_shard_size,
                **kwargs,
            )
            _write_index(unfinished, type(self).__name__, remote_code)
        if not remote_code:
            (folder / f"{CODE}.py").unlink(missing_ok=True)
        repo_id = repo_id or folder.absolute().name
        name = repo_id if push_to_hub else str(save_directory)
        new_card = not (folder / CARD).exists()
        if new_card:
            make_model_card(self, name, license, remote_code).save(folder / CARD)
        if push_to_hub:
            repo_id = create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
            if new_card:  # the repository's own card, if any, takes precedence
                with contextlib.suppress(EntryNotFoundError):
                    known = ModelCard.load(repo_id, token=token)
                    populate_model_card(known).save(folder / CARD)
            self._upload_folder(
                folder, repo_id, token=token, commit_message=commit_message, create_pr=create_pr
            )

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> None:
        """Upload the pipeline to the Hugging Face hub; a card in the repository is kept.

        Args:
            repo_id: the repository, created if necessary.
            **kwargs: arguments of `save_pretrained`.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Any:
        """Load a pipeline from a folder or the hub; arguments are those of Diffusers.

        `device_map="auto"` means "balanced", as in Accelerate. A folder whose index has
        `"_shares_parts": true` takes the parts that it lacks from the pipeline in its parent.

        Code in the folder is not run, and nobody is asked whether to run it.

        Raises:
            OSError: if a part is missing, or cannot be downloaded.
            TypeError, ValueError: if weights of the transformer are missing or unexpected, if
                weights of any part are not finite, if a configuration or a setting is unsound, or a
                part needs code.
        """
        folder = user_path(pretrained_model_name_or_path)
        if not (folder / INDEX).is_file() and not is_hub_name(pretrained_model_name_or_path):
            raise FileNotFoundError(
                f"{folder} has no {INDEX!r}: not the folder of a pipeline, nor a hub name."
                f"{lora_note(folder)}"
            )
        read_settings(folder)  # an error then names the file
        for part in (one for one in folder.glob("*/") if one.name not in kwargs):
            require_sound_config(part)
        if kwargs.get("device_map") == "auto":
            kwargs["device_map"] = "balanced"
        kwargs |= cls._parts_of_parent(folder, kwargs)
        with unattended():
            pipe = super().from_pretrained(
                os.path.expanduser(pretrained_model_name_or_path), **kwargs
            )
        for name, part in pipe.components.items():
            if isinstance(part, torch.nn.Module) and name not in ("transformer", *kwargs):
                require_whole(part, folder / name, _not_in(folder / name, part))
        return pipe

    @classmethod
    def _parts_of_parent(cls, folder: Path, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Load the parts that a folder shares with its parent, with the same arguments."""
        shared = [
            name
            for name in ENCODERS
            if name not in kwargs and folder_with_part(folder, name) != folder
        ]
        if not shared:
            return {}
        for name in shared:
            locate(PARTS[name], folder)
        others = {"transformer": None, "scheduler": None} | {
            name: None for name in ENCODERS if name not in shared
        }
        parent = cls.from_pretrained(pipeline_around(folder), **kwargs | others)
        return {name: getattr(parent, name) for name in shared}

    @classmethod
    def _dict_from_json_file(
        cls, json_file: str | os.PathLike[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Read an index, and ignore the folder's code: these classes do not need it."""
        config = read_json(Path(json_file))
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][-1]
        return config

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        config: str | Path | None = None,
        torch_dtype: torch.dtype | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Load a transformer from one file, and the other parts from elsewhere.

        Args:
            path: `.safetensors`, or `.pt` with nothing but tensors in it: a file, or its address on
                the Hugging Face hub.
            config: folder or hub repository of a pipeline to take the other parts from; by default
                they are those of the released model, from their repositories.
            torch_dtype: dtype of all parts; None keeps the dtype of each.
            local_files_only: take files of the hub from the cache, and download nothing.
            **kwargs: parts that are loaded already, such as `vae`; and arguments of
                `localdit.checkpoint.load_transformer`.

        Raises:
            OSError: if the file or a part is missing, or cannot be downloaded.
            ValueError: if the file is no checkpoint of a LocalDiT, is damaged, or contradicts an
                argument.
            TypeError: for an unknown argument.
        """
        given = {name: kwargs.pop(name) for name in PARTS if name in kwargs}
        absent = [name for name in PARTS if name not in given]
        released = Config()
        where = {}
        if not config:
            try:
                where = locate_parts(released, absent, local_files_only)
            except OSError as error:
                raise OSError(
                    f"{error}; or give from_single_file a pipeline as `config`, or the parts "
                    f"themselves: {', '.join(absent)}."
                ) from error
        transformer = LocalDiTTransformer2DModel.from_single_file(
            path, torch_dtype=torch_dtype, local_files_only=local_files_only, **kwargs
        )
        if config:
            return cls.from_pretrained(
                config,
                transformer=transformer,
                torch_dtype=torch_dtype,
                local_files_only=local_files_only,
                **given,
            )
        parts = load_parts(released, where, torch.device("cpu"), torch_dtype)
        return cls(**{"transformer": transformer, **parts, **given})

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Tensors,
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load an adapter into the transformer and make it active.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder with one, a hub name, or tensors
                by name. Files are `.safetensors`, or `.bin` or `.pt` with plain tensors; nothing in
                them is executed.
            adapter_name: name for the adapter; by default `default_0` and so on.
            hotswap: replace the weights of the loaded adapter `adapter_name`.
            **kwargs: as in Diffusers: `weight_name`, `subfolder`, `revision`, `token` ...

        Raises:
            ImportError: if peft is missing.
            FileNotFoundError: if the file is missing.
            TypeError: for an unknown argument.
            ValueError: if the file is damaged, holds no LoRA, or holds a LoRA of another model.
        """
        if not USE_PEFT_BACKEND:
            raise ImportError(lora.NEEDS_PEFT)
        super().load_lora_weights(
            pretrained_model_name_or_path_or_dict, adapter_name, hotswap, **kwargs
        )

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | Path | Tensors, **kwargs: Any
    ) -> Tensors | tuple[Tensors, dict[str, Any] | None]:
        """Return an adapter's tensors by name, and its settings with `return_lora_metadata`."""
        known = (*inspect.signature(cls.load_lora_weights).parameters, *lora.KEYWORDS)
        require_known("load_lora_weights", kwargs, known)
        source = pretrained_model_name_or_path_or_dict
        with_metadata = kwargs.pop("return_lora_metadata", False)
        metadata = None
        if isinstance(source, dict):
            tensors = super().lora_state_dict(source, **kwargs)
        elif (file := lora.adapter_file(source, **kwargs)) is not None:
            tensors, metadata = lora.read_adapter(file)
        else:
            kwargs.setdefault("use_safetensors", True)
            try:
                tensors, metadata = super().lora_state_dict(
                    str(source), return_lora_metadata=True, **kwargs
                )
            except RecursionError:
                raise ValueError(f"{source}: its metadata is nested too deep.") from None
            except (OSError, HFValidationError) as error:
                raise OSError(
                    f"The LoRA {source} could not be fetched from the Hugging Face hub "
                    f"({type(error).__name__}: {error}). Give a local file or folder, or check the "
                    "name and the connection."
                ) from error
        if not isinstance(source, dict):  # for a dict, Diffusers warns about what it cannot use
            lora.require_adapter(tensors, str(source))
        lora.require_no_text_encoder(tensors)
        return (tensors, metadata) if with_metadata else tensors

    @classmethod
    def load_lora_into_transformer(
        cls,
        state_dict: Tensors,
        transformer: LocalDiTTransformer2DModel,
        *args: Any,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Check that an adapter fits the transformer, and load it."""
        model = bare(transformer)
        tensors, metadata = lora.from_kohya(state_dict, metadata, model)
        lora.require_fit(tensors, model)
        metadata = lora.checked_settings(metadata, tensors, model)
        super().load_lora_into_transformer(tensors, transformer, *args, metadata=metadata, **kwargs)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        transformer_lora_layers: Tensors | LocalDiTTransformer2DModel | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[..., None] | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        *,
        adapter_name: str | None = None,
    ) -> None:
        """Save an adapter to `pytorch_lora_weights.safetensors`, for `load_lora_weights`.

        Args:
            save_directory: folder to write to, created if necessary.
            transformer_lora_layers: the transformer with the adapter: its rank, alpha and targets
                are saved too. Or tensors by name, as in Diffusers' training scripts: then
                `transformer_lora_adapter_metadata` has the rank, alpha and targets. Without them,
                loading takes the rank as alpha.
            is_main_process, weight_name, save_function: as in Diffusers.
            safe_serialization, transformer_lora_adapter_metadata: as in Diffusers. Without
                safetensors, the file has no place for rank, alpha and targets: only tensors by name
                can be saved.
            adapter_name: which adapter to save, if the transformer has several.

        Raises:
            OSError: if the file can't be written.
            ValueError: if the adapter is missing, its settings can't be saved, or `save_directory`
                is a file.
        """
        layers, metadata = bare(transformer_lora_layers), transformer_lora_adapter_metadata
        if isinstance(layers, LocalDiTTransformer2DModel):
            layers, metadata = lora.adapter_of(layers, adapter_name)
        if metadata and not safe_serialization:
            raise ValueError(
                "safe_serialization=False has no place for the adapter's rank, alpha and targets, "
                "without which it would load with another scale: leave it out, or give tensors by "
                "name without settings."
            )
        save_directory = user_path(save_directory)
        if save_directory.is_file():
            raise ValueError(f"{save_directory} is a file; expected a folder to write to.")
        with write_errors():
            super().save_lora_weights(
                save_directory,
                layers,
                is_main_process,
                weight_name,
                save_function,
                safe_serialization,
                lora.as_json(metadata) if metadata else None,
            )


def _not_in(folder: Path, model: torch.nn.Module) -> list[str]:
    """Return the weights of a model that the files in its folder lack.

    Libraries rename old weights while they load them, and quantize them. So there are none if the
    files have names that the model lacks, or if it is quantized.
    """
    held = open_files(sorted(folder.glob("*.safetensors")))
    state = model.state_dict()
    if not held or held.keys() - state or getattr(model, "hf_quantizer", None):
        return []
    tied = {state[name].data_ptr() for name in held}
    return [n for n, tensor in state.items() if n not in held and tensor.data_ptr() not in tied]


def _write_index(folder: Path, class_name: str, remote_code: bool) -> None:
    """Write the classes' names into the index, and the file that serves as remote code."""
    index = read_json(folder / INDEX)
    index["_class_name"] = [CODE, class_name] if remote_code else class_name
    if index["transformer"][1] == TRANSFORMER[1]:
        index["transformer"] = TRANSFORMER
    write_json(folder / INDEX, index)
    if remote_code:
        (folder / f"{CODE}.py").write_text(CODE_TEXT, "utf-8")
