"""The LocalDiT transformer: PixArt's blocks around attention within shifted windows."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormSingle
from einops import rearrange
from torch import nn

from ..checkpoint.loading import plan_loading, read_folder, require_known, require_savable
from ..checkpoint.reading import few, local_file, require_finite, weights_library
from ..files import is_hub_name, read_json, updated_folder, user_path
from .attention import CrossAttention, LocalDiTAttention
from .backends import checked_backend
from .block import LocalDiTBlock
from .configuration import require_sound_arguments, resolve_layer_types
from .cpu import bands, write_band
from .diffusers_hooks import complete_cache_config, scaled_adapters
from .layers import PatchEmbedding, modulate
from .text_projections import projected
from .windows import Route, WindowGrid, shift_sizes


class LocalDiTTransformer2DModel(
    ModelMixin, AttentionMixin, CacheMixin, PeftAdapterMixin, ConfigMixin
):
    """A diffusion transformer with self-attention within small shifted windows.

    It is called like Diffusers' `PixArtTransformer2DModel`. The size of the picture follows from
    the latents of each call. The defaults are those of the released 0.52B model.

    Args:
        num_attention_heads, attention_head_dim: heads, and channels per head.
        in_channels, out_channels: channels of the latents and of the prediction;
            `out_channels=None` means `in_channels`.
        num_layers: number of blocks.
        dropout: probability of dropping a channel in training.
        cross_attention_dim: channels of the text inside the blocks; None means the model's width,
            the only possible value if `caption_channels` is given.
        sample_size: side of the latents that the model is made for; sets the scale of the position
            embedding.
        patch_size: side of the square of latents that becomes a token.
        window_size: side of an attention window, in tokens.
        shift_schedule: "cyclic" rolls layer i by `i mod window_size` (the released model),
            "alternating" by `0, window_size // 2, 0, ...`.
        do_rope: rotate queries and keys by their position.
        use_global: give every layer a global context beside its windows.
        layer_types: "local", "local_pooled", "local_global" or "full" for each layer; or a string
            of types that repeat over the layers, as "local local local full", which the
            configuration keeps as a list. None means "local_global" in all layers with
            `use_global`, and "local" in all layers without.
        qk_norm_eps, norm_eps: epsilon of the norms of queries and keys, and of the layer norms.
        interpolation_scale: divides positions before they are embedded; None means
            `max(sample_size // 64, 1)`.
        use_additional_conditions: condition on resolution and aspect ratio; None means
            `sample_size == 128`.
        caption_channels: channels of the text encoder's states; None if they already have
            `cross_attention_dim` channels.
        num_embeds_ada_norm: number of timesteps that the model is trained for.
        norm_type: has to be "ada_norm_single".
        activation_fn: activation of the feed-forward, by its name in Diffusers.

    Raises:
        ValueError: if arguments contradict each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["LocalDiTBlock", "PatchEmbedding"]
    _repeated_blocks = ["LocalDiTBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "adaln_single"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 4,
        num_layers: int = 18,
        dropout: float = 0.0,
        cross_attention_dim: int | None = None,
        sample_size: int = 128,
        patch_size: int = 2,
        window_size: int = 4,
        shift_schedule: str = "cyclic",
        do_rope: bool = True,
        use_global: bool = False,
        layer_types: str | list[str] | None = None,
        qk_norm_eps: float = 1e-10,
        norm_eps: float = 1e-6,
        interpolation_scale: float | None = None,
        use_additional_conditions: bool | None = None,
        caption_channels: int | None = 4096,
        num_embeds_ada_norm: int = 1000,
        norm_type: str = "ada_norm_single",
        activation_fn: str = "gelu-approximate",
    ) -> None:
        super().__init__()
        require_sound_arguments(self.config, inspect.signature(LocalDiTTransformer2DModel.__init__))
        dim = num_attention_heads * attention_head_dim
        text_dim = dim if cross_attention_dim is None else cross_attention_dim
        if norm_type != "ada_norm_single":
            raise ValueError(f"`norm_type` is {norm_type!r}; it has to be 'ada_norm_single'.")
        if caption_channels is not None and text_dim != dim:
            raise ValueError(
                f"`cross_attention_dim` is {text_dim}, but captions are projected to the width "
                f"of the model, num_attention_heads * attention_head_dim = {dim}."
            )
        kinds = resolve_layer_types(layer_types, num_layers, use_global)
        if layer_types is not None:
            self.register_to_config(layer_types=kinds)
        shifts = shift_sizes(num_layers, window_size, shift_schedule)

        self.inner_dim = dim
        self.out_channels = in_channels if out_channels is None else out_channels
        self.use_additional_conditions = (
            sample_size == 128 if use_additional_conditions is None else use_additional_conditions
        )
        if self.use_additional_conditions and dim % 3:
            raise ValueError(
                f"num_attention_heads * attention_head_dim is {dim}; with "
                "`use_additional_conditions` it has to be a multiple of 3: height, width and "
                "aspect ratio take a third each."
            )
        self.gradient_checkpointing = False

        if interpolation_scale is None:
            interpolation_scale = max(sample_size // 64, 1)
        self.pos_embed = PatchEmbedding(
            patch_size, in_channels, dim, sample_size // patch_size, interpolation_scale
        )
        self.adaln_single = AdaLayerNormSingle(
            dim, use_additional_conditions=self.use_additional_conditions
        )
        self.caption_projection = None
        if caption_channels is not None:
            self.caption_projection = PixArtAlphaTextProjection(caption_channels, dim)

        heads = (num_attention_heads, attention_head_dim)
        self.transformer_blocks = nn.ModuleList(
            LocalDiTBlock(
                LocalDiTAttention(
                    *heads, window_size, shift, layer_type, do_rope, qk_norm_eps, dropout
                ),
                CrossAttention(*heads, text_dim, qk_norm_eps, dropout),
                dim,
                activation_fn,
                norm_eps,
                dropout,
            )
            for shift, layer_type in zip(shifts, kinds, strict=True)
        )

        self.norm_out = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * self.out_channels)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Load a Diffusers folder, or a model of the hub; arguments are those of Diffusers.

        Raises:
            OSError: if it is missing or incomplete, or cannot be downloaded.
            TypeError: for an argument that neither Diffusers nor the model takes.
            ValueError: if weights are missing, unexpected, of another shape than the configuration
                asks for, or not finite, or if the configuration is unsound.
        """
        source = os.path.expanduser(pretrained_model_name_or_path)
        folder = Path(source) / (kwargs.get("subfolder") or "")
        if not (is_hub_name(source) or kwargs.get("ignore_mismatched_sizes")):
            read_folder(cls, folder, **kwargs)
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(source, output_loading_info=True, **kwargs)
        wrong = [*info.get("missing_keys", ()), *info.get("unexpected_keys", ())]
        wrong = [name for name in wrong if ".attn2.to_kv." not in name]  # copies, once fused
        if wrong and getattr(model, "hf_quantizer", None) is None:
            raise ValueError(f"{folder}: {few(wrong)} missing or unexpected: another model's file.")
        for name, parameter in model.named_parameters():
            require_finite(folder, name, parameter)
        return (model, info) if with_info else model

    @classmethod
    def from_config(cls, config: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make a model of a configuration; arguments replace its values, as in `from_pretrained`.

        Raises:
            TypeError: for an argument that neither Diffusers nor the model takes.
        """
        if isinstance(config, dict) and not return_unused_kwargs:  # not a path, as Diffusers takes
            require_known("The model", kwargs, cls._get_init_keys(cls))
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str], **_: Any) -> dict[str, Any]:
        return read_json(Path(json_file))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: Callable[..., None] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the model as a Diffusers folder, which loads as the same model.

        Earlier weights of the same variant in the folder are replaced, once these are written.

        Compiled blocks, step caches and processors are not saved, and fused projections are saved
        separately. Arguments are those of Diffusers.

        Raises:
            OSError: if a file can't be written.
            TypeError: for an unknown argument.
            ValueError: if the model has adapters, or its weights are elsewhere or were replaced.
        """
        known = (super().save_pretrained, self.push_to_hub)
        names = [name for method in known for name in inspect.signature(method).parameters]
        require_known("save_pretrained", kwargs, names)
        require_savable(self)
        fused = [one for one in self._attentions() if one.fused_projections]
        for attention in fused:
            attention.unfuse_projections()
        folder = user_path(save_directory)
        if push_to_hub:
            kwargs.setdefault("repo_id", folder.name)
        try:
            with updated_folder(
                folder, functools.partial(weights_library, variant=variant)
            ) as unfinished:
                super().save_pretrained(
                    str(unfinished),
                    is_main_process,
                    save_function,
                    safe_serialization,
                    variant,
                    max_shard_size,
                    push_to_hub,
                    **kwargs,
                )
        finally:
            for attention in fused:
                attention.fuse_projections()

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> LocalDiTTransformer2DModel:
        """Load a flat checkpoint: see `localdit.checkpoint.load_transformer`.

        Args:
            path: the file, or its address on the Hugging Face hub.
            torch_dtype: dtype of the model; None keeps the file's.
            local_files_only: take a file of the hub from the cache, and download nothing.
            **overrides: further arguments of `load_transformer`.
        """
        file = local_file(path, local_files_only)
        return plan_loading(cls, file, torch_dtype=torch_dtype, **overrides).load()

    def set_sample_size(self, sample_size: int) -> None:
        """Scale the model's positions to pictures of another size; the weights stay.

        The rule is that of the released model: the positions of a square of `sample_size` latents
        are those of its tokens, divided by `max(sample_size // 64, 1)` (or by the
        `interpolation_scale` that the model was made with). The model's conditions do not change.
        """
        self.pos_embed.base_size = sample_size // self.config.patch_size
        self.pos_embed.interpolation_scale = self.config.interpolation_scale or max(
            sample_size // 64, 1
        )
        self.register_to_config(
            sample_size=sample_size, use_additional_conditions=self.use_additional_conditions
        )

    def set_attn_processor(self, processor: Any) -> None:
        """Compute attention with another processor; the weights stay.

        Args:
            processor: a processor for the self-attention of every layer (cross-attention keeps its
                own), or a dict with a processor for each name in `attn_processors`.
        """
        if isinstance(processor, dict):
            processors = dict(processor)
        else:
            processors = {
                name: processor if name.endswith(".attn1.processor") else current
                for name, current in self.attn_processors.items()
            }
        super().set_attn_processor(processors)

    def set_default_attn_processor(self) -> None:
        """Give every layer the processor that the model was made with."""
        for attention in self._attentions():
            attention.set_processor(attention._default_processor_cls())

    def set_window_attention_backend(self, backend: str) -> None:
        """Choose what computes attention within windows, in every "local" and "local_global" layer.

        PyTorch's operations always compute "local_pooled" layers.

        Args:
            backend: "triton", a kernel for NVIDIA GPUs; "torch", PyTorch's own operations, on any
                device; or "auto", the default: the kernel if it can be used.

        Raises:
            ValueError: for another name.
            ImportError: for "triton" if Triton is not installed.
        """
        checked_backend(backend)
        for processor in self.attn_processors.values():
            if hasattr(processor, "backend"):
                processor.backend = backend

    def unload_lora(self) -> None:
        """Remove all adapters; fused ones stay in the weights, and in fused projections as well."""
        super().unload_lora()
        for attention in self._attentions():
            if attention.fused_projections:
                attention.unfuse_projections()
                attention.fuse_projections()

    def _attentions(self) -> list[Any]:
        kinds = (LocalDiTAttention, CrossAttention)
        return [module for module in self.modules() if isinstance(module, kinds)]

    def enable_cache(self, config: Any) -> None:
        """Reuse results of earlier steps: see `diffusers.CacheMixin.enable_cache`."""
        super().enable_cache(complete_cache_config(config))

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile the blocks; blocks of the same kind and shift share a graph.

        Takes the arguments of `torch.compile`. PyTorch limits the number of graphs of a function,
        and all blocks are one function. From PyTorch 2.13 on, the limit applies to each kind of
        block separately.
        """
        if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
            return super().compile_repeated_blocks(*args, **kwargs)
        compile_call: Any = torch.compile
        blocks: Any = self.transformer_blocks
        compiled: dict[Any, Any] = {}
        for block in blocks:
            kind = block.attn1.shift_size, block.attn1._default_processor_cls
            if kind not in compiled:
                compiled[kind] = compile_call(
                    nn.Module._call_impl, *args, isolate_recompiles=True, **kwargs
                )
            block._compiled_call_impl = functools.partial(compiled[kind], block)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
        *,
        feature_blocks: Sequence[int] = (),
        route: Route | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor, ...]:
        """Predict the noise, or whatever the model was trained to predict, from noisy latents.

        Args:
            hidden_states: `(B, in_channels, H, W)` latents, H and W multiples of `patch_size`.
            encoder_hidden_states: `(B, L, caption_channels)` states of the text encoder.
            timestep: `(B,)`, or a single one for the whole batch.
            added_cond_kwargs: if the model uses additional conditions: "resolution" `(B, 2)`,
                height and width in pixels, and "aspect_ratio" `(B, 1)`, width / height; or one row
                of each for the whole batch.
            cross_attention_kwargs: may hold "scale", a factor of the active LoRA adapters in this
                call, and nothing else.
            attention_mask: has to be None; part of the signature of Diffusers' transformers.
            encoder_attention_mask: `(B, L)`, 1 = keep, 0 = discard; or a bias `(B, 1, L)`.
            return_dict: return an output object rather than a tuple.
            feature_blocks: indices of blocks whose output the tuple has after the sample, in the
                order of the blocks, each `(B, N, C)`. Training aligns them with one another.
            route: the only tokens that take certain blocks, in training; features are theirs.

        Returns:
            `sample` of shape `(B, out_channels, H, W)`.

        Raises:
            ValueError: if the latents do not divide into patches, a condition is missing or
                unknown, or `feature_blocks` names a missing block or needs `return_dict=False`.
        """
        patch = self.config.patch_size
        batch_size, _, *size = hidden_states.shape
        options = dict(cross_attention_kwargs or {})
        scale = options.pop("scale", None)
        self._check_inputs(size, added_cond_kwargs, options, attention_mask)
        self._check_feature_blocks(feature_blocks, return_dict)
        grid = WindowGrid(size[0] // patch, size[1] // patch, window_size=1)

        with scaled_adapters(self, scale) if scale is not None else contextlib.nullcontext():
            hidden_states = self.pos_embed(hidden_states)  # (B, height * width, C)
            timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(batch_size)
            conditions = {
                name: value if value is None else value.view(len(value), -1).expand(batch_size, -1)
                for name, value in (added_cond_kwargs or {}).items()
            }
            modulation, embedded_timestep = self.adaln_single(
                timestep, conditions, batch_size=batch_size, hidden_dtype=hidden_states.dtype
            )
            if self.caption_projection is not None:
                project = self.caption_projection
                encoder_hidden_states = projected(
                    encoder_hidden_states, project, [project.linear_1, project.linear_2], project
                )
            bias = _mask_to_bias(encoder_attention_mask, hidden_states.dtype)

            features = []
            for index, block in enumerate(self.transformer_blocks):
                map_size = grid.height, grid.width
                if route is not None and index in route.blocks:
                    map_size = route.height, route.width
                    if index == route.blocks.start:
                        skipping, hidden_states = hidden_states, route.take(hidden_states)
                args = (hidden_states, encoder_hidden_states, bias, modulation, *map_size)
                if torch.is_grad_enabled() and self.gradient_checkpointing:
                    hidden_states = self._gradient_checkpointing_func(block, *args)
                else:
                    hidden_states = block(*args)
                if index in feature_blocks:
                    taken = hidden_states
                    if route is not None and index not in route.blocks:
                        taken = route.take(hidden_states)
                    features.append(taken)
                if route is not None and index == route.blocks.stop - 1:
                    hidden_states = route.put_back(skipping, hidden_states)

            # In a model spread over devices, the parameter may not be where the last block is.
            table = self.scale_shift_table.to(hidden_states.device)
            table = table + embedded_timestep[:, None].to(table.device)
            final_shift, final_scale = table.chunk(2, dim=1)
            patches = None
            for tokens, _ in bands(grid, hidden_states):
                x = modulate(self.norm_out(hidden_states[:, tokens]), final_shift, final_scale)
                patches = write_band(patches, self.proj_out(x), tokens, grid)

        sample = rearrange(
            patches, "b (y x) (p q c) -> b c (y p) (x q)", y=grid.height, p=patch, q=patch
        )
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample, *features)

    def _check_inputs(
        self,
        size: list[int],
        added_cond_kwargs: dict[str, torch.Tensor] | None,
        options: dict[str, Any],
        attention_mask: torch.Tensor | None,
    ) -> None:
        """Refuse inputs that the model cannot take; `options` are those other than the scale."""
        patch = self.config.patch_size
        if any(side == 0 or side % patch for side in size):
            raise ValueError(
                f"Latents of {size[0]} x {size[1]} do not divide into {patch} x {patch} patches; "
                f"make both sides a multiple of {patch}."
            )
        if self.use_additional_conditions and added_cond_kwargs is None:
            raise ValueError(
                "This model is conditioned on the picture's size: pass `added_cond_kwargs` with "
                "'resolution' (B, 2) and 'aspect_ratio' (B, 1)."
            )
        if attention_mask is not None or options:
            raise ValueError(
                "`attention_mask` is not supported, nor anything in `cross_attention_kwargs` but "
                "'scale'."
            )

    def _check_feature_blocks(self, feature_blocks: Sequence[int], return_dict: bool) -> None:
        count = len(self.transformer_blocks)
        if any(index not in range(count) for index in feature_blocks):
            raise ValueError(
                f"`feature_blocks` is {list(feature_blocks)}; expected indices of the {count} "
                f"blocks, 0 to {count - 1}."
            )
        if feature_blocks and return_dict:
            raise ValueError("`feature_blocks` are returned in a tuple: pass `return_dict=False`.")


def _mask_to_bias(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Turn a mask `(B, L)`, 1 = keep, into a bias `(B, 1, L)`, 0 = keep, -10000 = discard."""
    if mask is None or mask.ndim == 3:
        return mask
    return (1 - mask.to(dtype))[:, None] * -10000.0
