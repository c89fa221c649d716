"""Pipelines small enough to test with, built in memory from a seed, without any download."""

import torch
import transformers
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from localdit.models import LocalDiTTransformer2DModel
from localdit.pipelines import LocalDiTPipeline
from localdit.pipelines.request import Request, TextEmbeddings

WORDS = (
    "a an the and or of on in above below left right photo picture painting small large red "
    "green blue yellow black white circle square triangle star cat dog mountain lake sky bad "
    "quality blurry"
)
TEXT_WIDTH = 16
TEXT_WIDTHS = {"flan-t5": 40, "umt5": 40, "gemma": 48, "clip": 32}  # of other text encoders


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with T5's conventions: pad id 0, `</s>` at the end."""
    vocabulary = ["<pad>", "</s>", "<unk>", *WORDS.split()]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_vae(kind: str = "sdxl") -> AutoencoderKL | AutoencoderDC | AutoencoderTiny:
    """An autoencoder with weights drawn from the present random state.

    Args:
        kind: "sdxl", or a kind of another latent space: "sd3" (16 channels and a shift), "dc" (32
            channels and 32 pixels per latent), "f16" (32 channels and 16 pixels per latent), "tiny"
            (16 channels, no posterior) or "statistics" (a mean and a standard deviation per
            channel).
    """
    if kind == "dc":
        channels = (4, 4, 8, 8, 16, 32)
        blocks = ("ResBlock",) * 5 + ("EfficientViTBlock",)
        scales = ((),) * 5 + ((5,),)
        return AutoencoderDC(
            latent_channels=32,
            attention_head_dim=8,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            encoder_layers_per_block=(1,) * 6,
            decoder_layers_per_block=(1,) * 6,
            encoder_qkv_multiscales=scales,
            decoder_qkv_multiscales=scales,
            scaling_factor=0.41407,
        ).eval()
    if kind == "tiny":
        return AutoencoderTiny(
            encoder_block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            num_encoder_blocks=(1,) * 4,
            num_decoder_blocks=(1,) * 4,
            latent_channels=16,
        ).eval()
    settings = {
        "sdxl": {"latent_channels": 4, "scaling_factor": 0.13025},
        "sd3": {
            "latent_channels": 16,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        "f16": {"latent_channels": 32, "scaling_factor": 0.5},
        "statistics": {
            "latent_channels": 4,
            "scaling_factor": 0.5,
            "latents_mean": (0.1, -0.2, 0.3, -0.4),
            "latents_std": (0.5, 1.0, 2.0, 0.25),
        },
    }
    channels = (4, 4, 4, 8, 8) if kind == "f16" else (4, 4, 8, 8)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=64,
        **settings[kind],
    ).eval()


def tiny_shape(vae: str) -> dict:
    """The arguments of a transformer that depend on the autoencoder, by its kind."""
    return {
        "sd3": {"in_channels": 16, "out_channels": 16},
        "tiny": {"in_channels": 16, "out_channels": 16},
        "dc": {"in_channels": 32, "out_channels": 32, "patch_size": 1, "sample_size": 4},
        "f16": {"in_channels": 32, "out_channels": 32, "patch_size": 1, "sample_size": 4},
    }.get(vae, {})


def tiny_components(seed: int = 0, vae: str = "sdxl", **transformer_overrides) -> dict:
    """The five components of a pipeline, with weights drawn from `seed`.

    Pictures have 64 pixels along a side, with the autoencoder "dc" 128.

    Args:
        seed: of the weights; the caller's random state is left alone.
        vae: the kind of the autoencoder; see `tiny_vae`.
        **transformer_overrides: arguments of the transformer that differ from the tiny ones.
    """
    settings = {
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "cross_attention_dim": 24,
        "num_layers": 2,
        "sample_size": 8,
        "window_size": 2,
        "caption_channels": TEXT_WIDTH,
        "use_additional_conditions": True,
        **tiny_shape(vae),
        **transformer_overrides,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = LocalDiTTransformer2DModel(**settings)
        autoencoder = tiny_vae(vae)
        text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=3 + len(WORDS.split()),
                d_model=TEXT_WIDTH,
                d_kv=8,
                d_ff=32,
                num_layers=1,
                num_heads=2,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        )
    return {
        "tokenizer": tiny_tokenizer(),
        "text_encoder": text_encoder.eval(),
        "vae": autoencoder,
        "transformer": transformer.eval(),
        "scheduler": DPMSolverMultistepScheduler(),
    }


def tiny_pipeline(seed: int = 0, vae: str = "sdxl", **transformer_overrides) -> LocalDiTPipeline:
    """A text-to-image pipeline of `tiny_components`, without a progress bar."""
    pipe = LocalDiTPipeline(**tiny_components(seed, vae, **transformer_overrides))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def request_of(**changes) -> Request:
    """A call for one picture of 64 pixels, for tests of single stages."""
    given = {
        "prompt": "a cat", "negative_prompt": "", "height": 64, "width": 64,
        "num_inference_steps": 20, "timesteps": None, "sigmas": None, "guidance_scale": 1.0,
        "guidance_interval": (0.0, 1.0), "num_images_per_prompt": 1, "eta": 0.0,
        "generator": None, "latents": None, "text": TextEmbeddings(None, None, None, None),
        "output_type": "pt", "return_dict": True, "callback_on_step_end": None,
        "callback_on_step_end_tensor_inputs": (), "max_sequence_length": 9,
    }  # fmt: skip
    return Request(**{**given, **changes})


def tiny_text_encoder(kind: str) -> transformers.PreTrainedModel:
    """A text encoder of one of the kinds in `TEXT_WIDTHS`, with random weights."""
    size = len(tiny_tokenizer())
    settings = {"vocab_size": size, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = settings | {
        "hidden_size": 48, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 16,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
    }  # fmt: skip
    t5 = {"vocab_size": size, "d_model": 40, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "umt5":
            model = transformers.UMT5EncoderModel(transformers.UMT5Config(**t5))
        elif kind == "flan-t5":
            model = transformers.T5EncoderModel(
                transformers.T5Config(**t5, feed_forward_proj="gated-gelu")
            )
        elif kind == "gemma":
            model = transformers.Gemma2Model(transformers.Gemma2Config(**decoder))
        else:
            clip = settings | {
                "hidden_size": 32, "intermediate_size": 32, "max_position_embeddings": 12,
                "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
            }  # fmt: skip
            model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip))
    return model.eval()
