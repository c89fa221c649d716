"""A pipeline's files: folders, checkpoints in one file, LoRA adapters, the Hugging Face hub."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.utils import USE_PEFT_BACKEND
from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, create_repo
from huggingface_hub.utils import EntryNotFoundError

from ..config import Config
from ..core.parts import PARTS, load_parts, locate_parts
from ..models.transformer import LocalDiTTransformer2DModel
from . import lora
from .lora import Tensors
from .model_card import make_model_card

if TYPE_CHECKING:
    from typing_extensions import Self


INDEX = "model_index.json"
CARD = "README.md"
CODE = "pipeline_localdit"
CODE_TEXT = '''"""For `trust_remote_code=True`: these pipelines need localdit to be installed."""

from localdit import LocalDiTImg2ImgPipeline, LocalDiTInpaintPipeline, LocalDiTPipeline
'''

# The library that a folder names for the transformer. `localdit.registration` adds it there. Under
# its own module, Diffusers would take it for code to be fetched from the hub, and refuse it.
TRANSFORMER = ["diffusers", "LocalDiTTransformer2DModel"]


class SavedPipeline(SanaLoraLoaderMixin, DiffusionPipeline):
    """Loading and saving of a pipeline; sampling is in `LocalDiTBasePipeline`.

    Diffusers' LoRA loader for Sana is the one that knows a transformer and nothing else. The
    methods here refuse, with a message that says why, what can't be a LoRA of this transformer, and
    save an adapter with its settings. Adapters of text encoders are not supported.
    """

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

        Args:
            save_directory: the folder, made if need be.
            safe_serialization: write safetensors, not pickles.
            variant: goes into the names of the weights, as in `model.fp16.safetensors`.
            max_shard_size: weights above it are split; bytes, or a string such as "2GB".
            push_to_hub: upload the folder as well.
            remote_code: let the folder say that its pipeline is a Python file in it, which imports
                localdit. `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` then
                needs no `import localdit` before, but demands to be trusted even after it, and the
                `AutoPipelineFor...` classes do not read such folders. The pipelines of localdit
                load them as any other.
            license: of the weights, for the card; by default that of LocalDiT.
            repo_id: where to upload to, by default the folder's name in one's own namespace; this
                and the following are for `push_to_hub`.
            commit_message, private, token, create_pr: as in Diffusers.
            **kwargs: as in Diffusers.
        """
        folder = Path(save_directory)
        super().save_pretrained(
            str(folder),
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
            **kwargs,
        )
        _write_index(folder, type(self).__name__, remote_code)
        repo_id = repo_id or folder.absolute().name
        name = repo_id if push_to_hub else str(save_directory)
        new_card = not (folder / CARD).exists()
        if new_card:
            make_model_card(self, name, license, remote_code).save(folder / CARD)
        if push_to_hub:
            repo_id = create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
            if new_card:
                _take_over_card(repo_id, folder / CARD, token)
            self._upload_folder(
                folder, repo_id, token=token, commit_message=commit_message, create_pr=create_pr
            )

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> None:
        """Upload the pipeline to the Hugging Face hub; a card that is there already is kept.

        Args:
            repo_id: the repository, made if need be.
            **kwargs: arguments of `save_pretrained`.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **kwargs)

    @classmethod
    def _dict_from_json_file(
        cls, json_file: str | os.PathLike[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Read an index. Whoever loads with our class needs no code from the folder."""
        config = super()._dict_from_json_file(json_file, **kwargs)
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
        """Load a checkpoint in one file, and the parts that it lacks from elsewhere.

        Args:
            path: `.safetensors`, or `.pt` with nothing but tensors in it: a file, or its address on
                the Hugging Face hub.
            config: a pipeline, as folder or repository of the hub, whose other parts are taken; by
                default those of the released model are, from their repositories.
            torch_dtype: dtype of all parts; None keeps that of each.
            local_files_only: take files of the hub from the cache, and fetch nothing.
            **kwargs: parts that are there already, such as `vae`; and arguments of
                `localdit.checkpoint.load_transformer`.

        Raises:
            OSError: the file or a part is missing, or cannot be fetched.
            ValueError: the file is no checkpoint of a LocalDiT, is damaged, or contradicts an
                argument.
            TypeError: for an unknown argument.
        """
        given = {name: kwargs.pop(name) for name in PARTS if name in kwargs}
        absent = [name for name in PARTS if name not in given]
        released = Config()
        where = {} if config else _locate(released, absent, local_files_only)
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
                by name. Beside `.safetensors`, a `.bin` or `.pt` of plain tensors is read; nothing
                in it is executed.
            adapter_name: what the adapter is called from now on; by default `default_0` and so on.
            hotswap: whether to put the weights in the place of those of `adapter_name`.
            **kwargs: as Diffusers takes them: `weight_name`, `subfolder`, `revision`, `token` ...

        Raises:
            ImportError: if peft is missing.
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or holds no LoRA, or it is one of another model.
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
        """The tensors of an adapter by name, and with `return_lora_metadata` its settings as well.

        Raises:
            FileNotFoundError, ValueError: as `load_lora_weights` does.
        """
        source = pretrained_model_name_or_path_or_dict
        with_metadata = kwargs.pop("return_lora_metadata", False)
        metadata = None
        if isinstance(source, dict):
            tensors = super().lora_state_dict(source, **kwargs)
        elif (file := lora.local_file(source, **kwargs)) is not None:
            tensors, metadata = lora.read_adapter(file)
        else:
            kwargs.setdefault("use_safetensors", True)
            tensors, metadata = super().lora_state_dict(
                str(source), return_lora_metadata=True, **kwargs
            )
        if not isinstance(source, dict):  # of a dict, Diffusers warns that it is of no use
            lora.require_adapter(tensors, str(source))
        lora.require_no_text_encoder(tensors)
        return (tensors, metadata) if with_metadata else tensors

    @classmethod
    def load_lora_into_transformer(
        cls,
        state_dict: Tensors,
        transformer: LocalDiTTransformer2DModel,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Make sure that an adapter fits the transformer, then put it in.

        Raises:
            ValueError: if it does not.
        """
        lora.require_fit(state_dict, lora.bare(transformer))
        super().load_lora_into_transformer(state_dict, transformer, *args, **kwargs)

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
        """Write an adapter to `pytorch_lora_weights.safetensors`, as `load_lora_weights` reads it.

        Args:
            save_directory: folder to write to; made where there is none.
            transformer_lora_layers: the transformer whose adapter is to be saved, with its rank,
                alpha and targets. Or tensors by name, as Diffusers' training scripts pass them:
                then `transformer_lora_adapter_metadata` has to say those; without it, alpha is
                taken to be the rank when the file is loaded.
            is_main_process, weight_name, save_function: as in Diffusers.
            safe_serialization, transformer_lora_adapter_metadata: likewise.
            adapter_name: which of the transformer's adapters; not needed where there is one.

        Raises:
            ValueError: if there is no such adapter, or `save_directory` is a file.
        """
        layers, metadata = lora.bare(transformer_lora_layers), transformer_lora_adapter_metadata
        if isinstance(layers, LocalDiTTransformer2DModel):
            layers, metadata = lora.adapter_of(layers, adapter_name)
        if Path(save_directory).is_file():
            raise ValueError(f"{save_directory} is a file; expected a folder to write to.")
        super().save_lora_weights(
            save_directory,
            layers,
            is_main_process,
            weight_name,
            save_function,
            safe_serialization,
            lora.as_json(metadata) if metadata else None,
        )


def _write_index(folder: Path, class_name: str, remote_code: bool) -> None:
    """Name the classes so that they are found, and write the code that remote code is."""
    index = json.loads((folder / INDEX).read_text("utf-8"))
    index["_class_name"] = [CODE, class_name] if remote_code else class_name
    if index["transformer"][1] == TRANSFORMER[1]:
        index["transformer"] = TRANSFORMER
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    code = folder / f"{CODE}.py"
    if remote_code:
        code.write_text(CODE_TEXT, "utf-8")
    else:
        code.unlink(missing_ok=True)


def _take_over_card(repo_id: str, card: Path, token: str | None) -> None:
    """Keep the card of the repository, if it has one."""
    try:
        known = ModelCard.load(repo_id, token=token)
    except EntryNotFoundError:
        return
    populate_model_card(known).save(card)


def _locate(config: Config, absent: list[str], local_files_only: bool) -> dict[str, Any]:
    try:
        return locate_parts(config, absent, local_files_only)
    except OSError as error:
        raise OSError(
            f"{error}; or give from_single_file a pipeline as `config`, or the parts themselves: "
            f"{', '.join(absent)}."
        ) from error
