"""Checkpoints of previews: ``AutoencoderTiny`` from a folder or a single file, TAEF2's own blocks included.

TAEF2's weights fit no class of diffusers: in its blocks below the first upsampling, a branch over the whole map is
added before the convolutions. diffusers' ``AutoencoderTiny`` would load the rest and drop the branch without an error;
here every tensor of the decoder must find its place.

Source of the architecture and the key names: madebyollin's ``taesd.py`` (``use_midblock_gn``), and the model card of
``madebyollin/taef2``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from safetensors import safe_open

from fluxvae.errors import CheckpointError

__all__ = ["PooledBlock", "add_pools", "is_preview", "load_preview"]

_FIRST = "decoder.layers.0.weight"


class PooledBlock(AutoencoderTinyBlock):  # type: ignore[misc]
    """``block(x + pool(x))``; the pool's GroupNorm sees the whole map."""

    def __init__(self, channels: int, act_fn: str) -> None:
        super().__init__(channels, channels, act_fn)
        wide = 4 * channels
        self.pool = torch.nn.Sequential(
            torch.nn.Conv2d(channels, wide, 1, bias=False),
            torch.nn.GroupNorm(4, wide),
            torch.nn.ReLU(inplace=True),
            torch.nn.Conv2d(wide, channels, 1, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, H, W) to the same."""
        result: torch.Tensor = super().forward(x + self.pool(x))
        return result


def add_pools(vae: AutoencoderTiny) -> None:
    """Make the decoder TAEF2's: new `PooledBlock`\\ s in place of the blocks below the first upsampling."""
    channels, act_fn = vae.config["decoder_block_out_channels"][0], vae.config["act_fn"]
    for index in range(2, 2 + vae.config["num_decoder_blocks"][0]):
        vae.decoder.layers[index] = PooledBlock(channels, act_fn)


def is_preview(shapes: Mapping[str, list[int]]) -> bool:
    """Whether a file with these tensors holds an ``AutoencoderTiny``, by the names diffusers gives to them."""
    return _FIRST in shapes


def load_preview(
    path: Path, shapes: Mapping[str, list[int]], config: Mapping[str, Any] | None, dtype: torch.dtype | None
) -> AutoencoderTiny:
    """Load the decoder of a preview.

    Args:
        path: a whole safetensors file with these ``shapes``.
        config: of ``config.json``; None: what the file's shapes say, and else diffusers' defaults.
        dtype: of the weights; as stored where left out.

    Raises:
        CheckpointError: the decoder lacks a tensor, or has no place for one.
    """
    if config is None:
        width, channels = shapes[_FIRST][:2] if _FIRST in shapes else (64, 4)
        config = {"latent_channels": channels, "decoder_block_out_channels": (width,) * 4}
    with torch.device("meta"):
        vae: AutoencoderTiny = AutoencoderTiny.from_config(config)
        vae.encoder = None
        if any(".pool." in key for key in shapes if key.startswith("decoder.")):
            add_pools(vae)
    wanted = {key: list(tensor.shape) for key, tensor in vae.state_dict().items()}
    given = {key: shape for key, shape in shapes.items() if key.startswith("decoder.")}
    wrong = sorted(key for key in wanted.keys() | given.keys() if wanted.get(key) != given.get(key))
    if wrong:
        key = wrong[0]
        raise CheckpointError(
            f"checkpoint: {path} is no AutoencoderTiny of this configuration: {len(wrong)} of the decoder's tensors "
            f"differ, {key} among them: got {given.get(key, 'none')}, expected {wanted.get(key, 'none')}; config and "
            "weights do not belong together, or the network is one that is not known here"
        )
    with safe_open(path, framework="pt") as file:
        vae.load_state_dict({key: file.get_tensor(key) for key in wanted}, assign=True)
    return vae if dtype is None else torch.nn.Module.to(vae, dtype)
