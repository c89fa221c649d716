"""Folders of pipelines that Diffusers' own classes load, here and from the Hugging Face hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, create_repo
from huggingface_hub.utils import EntryNotFoundError

from .model_card import make_model_card

INDEX = "model_index.json"
CARD = "README.md"
CODE = "pipeline_localdit"
CODE_TEXT = '''"""For `trust_remote_code=True`: these pipelines need localdit to be installed."""

from localdit import LocalDiTImg2ImgPipeline, LocalDiTInpaintPipeline, LocalDiTPipeline
'''

# The library that a folder names for the transformer. `localdit.registration` adds it there. Under
# its own module, Diffusers would take it for code to be fetched from the hub, and refuse it.
TRANSFORMER = ["diffusers", "LocalDiTTransformer2DModel"]


class SavingMixin(DiffusionPipeline):
    """`save_pretrained` and `push_to_hub` with a model card and, on request, code."""

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
