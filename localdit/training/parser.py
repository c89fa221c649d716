"""The parser of `train.py`: which options there are, with their defaults and help.

The defaults are those of `Config`. Nothing heavy is imported here, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from localdit.config import Config
from localdit.parsing import Parser, folder_argument, name_argument, path_argument, text_argument
from localdit.training.stages import STAGE_OPTIONS

DESCRIPTION = """Train a LocalDiT on captioned pictures.

    python train.py --data-root pictures --image-size 512 --batch-size 4
    accelerate launch train.py --data-root pictures --image-size 512 --batch-size 2
"""
FORMATS = ("auto", "folder", "metadata", "webdataset", "saved", "encoded")
DISTIL = "distil"  # the method that `--distillation` names
# The class of each training method, in `localdit.training.methods`. It is loaded after the options.
METHODS = {
    "fine-tuning": "fine_tuning.FineTuning",
    "knowledge-distillation": "distillation.KnowledgeDistillation",
    "latent-consistency": "distillation.LatentConsistency",
    "trajectory": "distillation.TrajectoryDistillation",
    "continuous-consistency": "distillation.ContinuousConsistency",
}
DISTILLATIONS = tuple(METHODS)[2:]
PREDICTION_TYPES = ("epsilon", "v_prediction", "flow")
# The options of distillation, with their defaults.
DISTIL_OPTIONS = {
    "distillation": "latent-consistency",
    "teacher_guidance_scale": None,  # that of the teacher's folder
    "teacher_steps": 50,
    "student_steps": 4,
}
METHOD_OPTIONS = ("method", "teacher", *DISTIL_OPTIONS)
# The options of fine-tuning that help a model to learn in fewer steps, with their defaults.
LEARNING_OPTIONS = {
    "contrastive_weight": 0.0,
    "alignment_weight": 0.0,
    "alignment_blocks": None,
    "token_routing": 0.0,
    "routing_blocks": None,
    "repa_weight": 0.0,
    "repa_encoder": None,
    "repa_block": None,
}
# The options about the pictures themselves, with their defaults. Encoded data has its own values.
PICTURE_OPTIONS: dict[str, Any] = {
    "crop": "buckets",
    "max_aspect_ratio": 2.0,
    "max_upscale": 1.5,
    "max_crop": 1.0,
    "horizontal_flip": 0.0,
}
# Options whose use depends on data or weights. They stay None until these are known.
LATE_OPTIONS: dict[str, Any] = PICTURE_OPTIONS | {"transformer_config": "released"}


def make_parser(prog: str | None = None) -> Parser:
    """Return the parser of all options, in groups."""
    parser = Parser(prog=prog, description=DESCRIPTION, formatter_class=HelpFormatter)
    defaults = Config()
    data = parser.add_argument_group("data")
    add_data_options(data, defaults)
    _add_visit_options(data, defaults)
    models = parser.add_argument_group("models")
    _add_model_options(models)
    add_encoder_options(models, defaults)
    _add_objective_options(parser.add_argument_group("objective"))
    _add_learning_options(parser.add_argument_group("learning in fewer steps"))
    _add_optimisation_options(parser.add_argument_group("optimisation"), defaults)
    _add_output_options(parser.add_argument_group("output"), defaults)
    return parser


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Show the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        has_default = action.default not in (None, False, [], argparse.SUPPRESS)
        return (action.help or "") + (" (default: %(default)s)" if has_default else "")


def add_data_options(group: argparse._ArgumentGroup, defaults: Config) -> None:
    """Add the options about the data and its sizes, which training and encoding share."""
    add, pictures = group.add_argument, PICTURE_OPTIONS
    add("--data-root", type=name_argument, required=True,
        help="folder of captioned pictures, WebDataset tars ('shards/{000..123}.tar'), a saved "
        "Hugging Face dataset, or encoded data")  # fmt: skip
    add("--data-format", choices=FORMATS, default="auto",
        help="format of the data at --data-root; auto recognises it by the files")  # fmt: skip
    add("--image-size", type=int, default=512,
        help="side of a square picture in pixels, a multiple of the pixels per token: 16 with the "
        "released VAE")  # fmt: skip
    add("--crop", choices=["buckets", "center"], default=pictures["crop"],
        help="cropping method. buckets: fit each picture to the bucket of the nearest aspect "
        "ratio, which has about as many pixels as the square; center: crop all pictures to the "
        "square")  # fmt: skip
    add("--max-aspect-ratio", type=float, default=pictures["max_aspect_ratio"],
        help="largest ratio of the longer side of a bucket to the shorter")  # fmt: skip
    add("--max-upscale", type=float, default=pictures["max_upscale"],
        help="largest factor by which a picture may be enlarged; smaller pictures are left "
        "out")  # fmt: skip
    add("--max-crop", type=float, default=pictures["max_crop"],
        help="largest share of a picture that may be cut away to fit its bucket; pictures that "
        "would lose more, such as panoramas, are left out")  # fmt: skip
    add("--max-broken", type=float, default=0.1,
        help="largest accepted share of broken samples; if there are more, the run "
        "stops")  # fmt: skip
    add("--max-caption-length", type=int, default=defaults.max_length,
        help="largest number of text tokens in a caption; longer captions are cut")  # fmt: skip
    add("--num-workers", type=int,
        help=f"number of processes that read pictures, per training process; by default "
        f"{defaults.num_workers}, or the number of cores if that is lower")  # fmt: skip


def _add_visit_options(group: argparse._ArgumentGroup, defaults: Config) -> None:
    add = group.add_argument
    add("--batch-size", type=int, default=defaults.batch_size,
        help="pictures per batch on each process")  # fmt: skip
    add("--token-dropout", type=float, default=defaults.token_dropout,
        help="share of captions replaced by the empty caption, which classifier-free guidance "
        "needs")  # fmt: skip
    add("--horizontal-flip", type=float, default=PICTURE_OPTIONS["horizontal_flip"],
        help="share of pictures mirrored left to right")  # fmt: skip
    add("--stages", type=path_argument,
        help="JSON file with a list of stages, each an object that changes some of these options: "
        f"{', '.join(name.replace('_', '-') for name in STAGE_OPTIONS)}")  # fmt: skip
    add("--dry-run", action="store_true",
        help="report what the data contains and what the run will cost, and exit")  # fmt: skip


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--transformer", type=path_argument,
        help="Diffusers folder or checkpoint file of a LocalDiT or a PixArt to start from, or the "
        "folder of its pipeline; without it, a new transformer is trained")  # fmt: skip
    add("--transformer-config", type=name_argument, default=LATE_OPTIONS["transformer_config"],
        help="shape of a transformer that is new or starts from a PixArt: released; released-f32 "
        "or released-f16, for VAEs with 32 or 16 pixels per latent; tiny; or a JSON "
        "file")  # fmt: skip
    add("--new-latents", type=int, metavar="PATCH_SIZE",
        help="adapt --transformer to the latents of another VAE, with patches of this side in "
        "latents; the patch embedding and the output layer are new, all other weights are "
        "kept")  # fmt: skip
    add("--method", choices=[*tuple(METHODS)[:2], DISTIL], default="fine-tuning",
        help="training method. fine-tuning: learn from the data alone, also for a new transformer; "
        "knowledge-distillation: learn from the predictions of --teacher; distil: learn to sample "
        "in a few steps what --teacher samples in many")  # fmt: skip
    add("--teacher", type=path_argument,
        help="Diffusers folder or checkpoint file of the frozen LocalDiT that --method "
        "knowledge-distillation or distil learns from, or the folder of its pipeline")  # fmt: skip
    add("--distillation", choices=DISTILLATIONS,
        help="loss of --method distil; latent-consistency if not given")  # fmt: skip
    add("--teacher-guidance-scale", type=float,
        help="guidance scale of the teacher, which --method distil builds into the student; by "
        "default, the one in the teacher's folder")  # fmt: skip
    add("--teacher-steps", type=int,
        help="number of steps of the teacher from noise to a picture, for --method distil; "
        f"{DISTIL_OPTIONS['teacher_steps']} if not given")  # fmt: skip
    add("--student-steps", type=int,
        help="default number of sampling steps of the student of --method distil; "
        f"{DISTIL_OPTIONS['student_steps']} if not given")  # fmt: skip
    add("--lora-rank", type=int,
        help="train LoRA adapters of this rank, and freeze the weights of --transformer; without "
        "it, all weights are trained")  # fmt: skip
    add("--lora-alpha", type=float,
        help="strength of the LoRA adapters, which are multiplied by alpha / rank; by default the "
        "rank")  # fmt: skip
    add("--lora-target-modules", nargs="+", metavar="NAME",
        help="linear layers that get LoRA adapters, by the ends of their names; by default, all "
        "linear layers of attention and feed-forward")  # fmt: skip
    add("--lora-dropout", type=float, default=0.0,
        help="probability that an input channel of a LoRA adapter is dropped")  # fmt: skip


def add_encoder_options(group: argparse._ArgumentGroup, defaults: Config) -> None:
    """Add the options about VAE and text encoder, which training and encoding share."""
    add = group.add_argument
    add("--pretrained", type=path_argument,
        help="pipeline folder with the tokenizer, the text encoder and the VAE; --tokenizer, "
        "--text-encoder and --vae replace them one by one")  # fmt: skip
    add("--vae", type=name_argument,
        help=f"folder or hub name of the VAE; by default, that of --pretrained, or else "
        f"{defaults.vae}")  # fmt: skip
    add("--text-encoder", type=name_argument,
        help=f"folder or hub name of the text encoder; by default, that of --pretrained, or else "
        f"{defaults.text_encoder}")  # fmt: skip
    add("--tokenizer", type=name_argument,
        help="folder or hub name of the tokenizer; by default, the text encoder's")  # fmt: skip


def _add_objective_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--prediction-type", choices=PREDICTION_TYPES,
        help="what the model predicts: the noise, the velocity of diffusion, or the velocity of "
        "flow matching; by default, the prediction type of the scheduler beside --transformer or "
        "--teacher, or else epsilon")  # fmt: skip
    add("--timestep-sampling", choices=["uniform", "logit_normal"], default="uniform",
        help="distribution of the timesteps in training")  # fmt: skip
    add("--min-snr-gamma", type=float,
        help="cap of the signal-to-noise ratio in the weight of the loss; without it, the loss is "
        "not weighted")  # fmt: skip
    add("--flow-shift", type=float,
        help="shift of flow matching's timesteps towards noise; 3 suits 1024 pixels; by default, "
        "the shift of the scheduler beside --transformer or --teacher, or else 1")  # fmt: skip


def _add_learning_options(group: argparse._ArgumentGroup) -> None:
    add, defaults = group.add_argument, LEARNING_OPTIONS
    add("--contrastive-weight", type=float, default=defaults["contrastive_weight"],
        help="weight of a term that moves each prediction away from the target of another sample "
        "of the batch, 0.05 in the paper; 0 turns it off")  # fmt: skip
    add("--alignment-weight", type=float, default=defaults["alignment_weight"],
        help="weight of a term that pulls the features of a block towards those of a later one; 0 "
        "turns it off")  # fmt: skip
    add("--alignment-blocks", type=int, nargs=2, metavar=("EARLIER", "LATER"),
        help="the two blocks of --alignment-weight, counted from 1; by default, those at 8/28 and "
        "16/28 of the depth: 5 and 10 of 18")  # fmt: skip
    add("--token-routing", type=float, default=defaults["token_routing"],
        help="share of the tokens that skip the middle blocks in training: all but a rectangle of "
        "windows at a random place; 0 passes all tokens through all blocks")  # fmt: skip
    add("--routing-blocks", type=int, nargs=2, metavar=("FIRST", "LAST"),
        help="first and last block that --token-routing skips, counted from 1; by default, all "
        "blocks but the first 2/28 and the last 4/28 are skipped: 2 to 15 of 18")  # fmt: skip
    add("--repa-weight", type=float, default=defaults["repa_weight"],
        help="weight of a term that pulls the features of a block, through a small trained "
        "network, towards those that --repa-encoder computes from the picture, 0.5 in the paper; 0 "
        "turns it off")  # fmt: skip
    add("--repa-encoder", type=path_argument, metavar="FOLDER",
        help="folder of the frozen image encoder for --repa-weight, a vision transformer of the "
        "Transformers library such as DINOv2")  # fmt: skip
    add("--repa-block", type=int,
        help="the block of --repa-weight, counted from 1; by default, the one at 8/28 of the "
        "depth: 5 of 18")  # fmt: skip


def _add_optimisation_options(group: argparse._ArgumentGroup, defaults: Config) -> None:
    add = group.add_argument
    add("--max-train-steps", type=int, default=defaults.max_datasteps,
        help="number of optimizer steps")  # fmt: skip
    add("--learning-rate", type=float, default=defaults.learning_rate, help="highest learning rate")
    add("--lr-schedule", choices=["constant", "cosine"], default="constant",
        help="learning rate after the warm-up: constant, or a cosine that falls to 0")  # fmt: skip
    add("--warmup-steps", type=int, default=0, help="steps in which the learning rate rises from 0")
    add("--optimizer", choices=["adamw", "adamw8bit", "muon"], default="adamw",
        help="AdamW; the AdamW of bitsandbytes with an 8-bit state; or Muon for the matrices of "
        "the blocks, with AdamW for everything else")  # fmt: skip
    add("--weight-decay", type=float, default=defaults.weight_decay, help="weight decay")
    add("--gradient-clip", type=float, default=defaults.gradient_clip,
        help="largest norm of the gradient; larger gradients are scaled down")  # fmt: skip
    add("--gradient-accumulation-steps", type=int, default=1, help="batches per optimizer step")
    add("--gradient-checkpointing", action="store_true",
        help="recompute activations in the backward pass: less memory, more time")  # fmt: skip
    add("--compile", action="store_true", help="compile the blocks with torch.compile")
    add("--mixed-precision", choices=["no", "fp16", "bf16"],
        help="precision of the trained model's forward pass; by default, that of Accelerate's "
        "configuration")  # fmt: skip
    add("--ema-decay", type=float, default=defaults.ema_beta,
        help="decay of the averaged weights (EMA), which pipelines use")  # fmt: skip
    add("--ema-on-cpu", action="store_true", help="keep the averaged weights in CPU memory")
    add("--post-hoc-ema", action="store_true", default=None,
        help="also keep two averages and save snapshots of them with each checkpoint; an average "
        "of any length can be rebuilt from the snapshots after training")  # fmt: skip
    add("--max-skipped-steps", type=int, default=10,
        help="number of steps that may be skipped because their loss or gradient is not finite; "
        "one more stops the training")  # fmt: skip
    add("--seed", type=int, default=0,
        help="seed of initial weights, order of samples, captions, noise")  # fmt: skip


def _add_output_options(group: argparse._ArgumentGroup, defaults: Config) -> None:
    add = group.add_argument
    add("--output", type=folder_argument, default=Path("runs/train"),
        help="folder that the run writes to")  # fmt: skip
    add("--resume", metavar="CHECKPOINT", type=name_argument,
        help="folder of the checkpoint to resume from, or auto for the newest undamaged one in "
        "--output, if any")  # fmt: skip
    add("--save-interval", type=int, default=defaults.save_checkpoint_interval,
        help="steps between checkpoints")  # fmt: skip
    add("--keep-checkpoints", type=int, default=2, help="number of checkpoints to keep, at least 2")
    add("--log-interval", type=int, default=50, help="steps between lines of metrics.jsonl")
    add("--log-samples", action="store_true",
        help="write the ids of each step's samples to samples-RANK.jsonl")  # fmt: skip
    add("--validation-prompts", nargs="+", default=[], metavar="PROMPT", type=text_argument,
        help="prompts to generate pictures from at each validation")  # fmt: skip
    add("--validation-guidance-scale", type=float,
        help="guidance scale of the pictures of --validation-prompts; by default, the one in the "
        "folder of --transformer, or 7 for a new transformer; not for --method distil, whose "
        "student is not guided")  # fmt: skip
    add("--validation-samples", type=int, default=0,
        help="number of samples held out of training, on which the loss is measured")  # fmt: skip
    add("--validation-interval", type=int, default=defaults.validation_interval,
        help="steps between validations, which generate pictures and measure losses")  # fmt: skip
    add("--use-wandb", action="store_true", help="also log to Weights & Biases")
    add("--use-tensorboard", action="store_true", help="also log to TensorBoard")
