"""Write an autoencoder whose latents are the pixels themselves.

    python recipes/study/write_autoencoder.py --output output/study/vae

Nothing is trained: each convolution of an `AutoencoderTiny` copies its input. White is 0 and black
-3 in the standardised latents, and a decoded picture differs from the encoded one by less than half
a level of 255. So a model's mistakes are its own, and encoding and decoding cost nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

SCALE = 1 / 16  # of the autoencoder's latents, where the decoder's tanh is nearly linear
BLACK = 3.0  # distance of black from white in standardised latents
_SHIFT = 1.0  # lifts all values above 0, where the decoder's activation changes nothing


def build_autoencoder() -> AutoencoderTiny:
    """Build an autoencoder of one level with three channels, which changes nothing."""
    import torch
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(
        encoder_block_out_channels=(3,), decoder_block_out_channels=(3,),
        num_encoder_blocks=(0,), num_decoder_blocks=(0,), latent_channels=3,
        scaling_factor=BLACK / SCALE,
    )  # fmt: skip
    into, scale = vae.encoder.layers
    lift, _, out = vae.decoder.layers
    with torch.no_grad():
        for layer, weight, bias in (
            (into, 1.0, -1.0), (scale, SCALE, 0.0), (lift, 1.0, _SHIFT),
            (out, 1 / SCALE, 1.0 - _SHIFT / SCALE),
        ):  # fmt: skip
            torch.nn.init.dirac_(layer.weight).mul_(weight)
            layer.bias.fill_(bias)
    return vae


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    build_autoencoder().save_pretrained(parser.parse_args().output)


if __name__ == "__main__":
    main()
