"""The blocks of the preview TAEF2, which diffusers' ``AutoencoderTiny`` lacks.

The blocks before TAEF2's first upsampling have a further branch, whose GroupNorm looks at the whole map, and whose
output is added to the input of the block's convolutions. diffusers would load everything else and drop this branch
without an error, and the images would be wrong.

Source of the architecture and the key names: madebyollin's ``taesd.py`` (``use_midblock_gn``), and the model card of
``madebyollin/taef2``.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock

from fluxvae.engine.way import DECODE, Way

__all__ = ["PooledBlock", "add_pools"]


class PooledBlock(AutoencoderTinyBlock):  # type: ignore[misc]
    """A block of TAEF2, ``block(x + pool(x))``. The GroupNorm of ``pool`` takes its statistics of the whole map."""

    def __init__(self, channels: int, act_fn: str) -> None:
        super().__init__(channels, channels, act_fn)
        wide, like = 4 * channels, next(self.parameters())
        device, dtype = like.device, like.dtype
        self.pool = torch.nn.Sequential(
            torch.nn.Conv2d(channels, wide, 1, bias=False, device=device, dtype=dtype),
            torch.nn.GroupNorm(4, wide, device=device, dtype=dtype),
            torch.nn.ReLU(inplace=True),
            torch.nn.Conv2d(wide, channels, 1, bias=False, device=device, dtype=dtype),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block to a map (B, channels, H, W); the result has the same shape."""
        result: torch.Tensor = super().forward(x + self.pool(x))
        return result


def add_pools(vae: AutoencoderTiny, way: Way = DECODE) -> None:
    """Turn one half into TAEF2's: put new `PooledBlock`\\ s in place of the blocks at the latents' resolution.

    Those are a decoder's blocks before the first upsampling, and an encoder's behind the last downsampling.
    """
    config = vae.config
    if way == DECODE:
        layers, first, count = vae.decoder.layers, 2, config["num_decoder_blocks"][0]
        channels = config["decoder_block_out_channels"][0]
    else:
        layers, count = vae.encoder.layers, config["num_encoder_blocks"][-1]
        first, channels = len(layers) - 1 - count, config["encoder_block_out_channels"][-1]
    for index in range(first, first + count):
        layers[index] = PooledBlock(channels, config["act_fn"])
