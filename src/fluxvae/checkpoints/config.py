"""Works out the config of a VAE from the shapes of its decoder's tensors, because a single file has no config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fluxvae.checkpoints.families import FAMILIES, Family
from fluxvae.checkpoints.layouts import MOST_LEVELS, Vae
from fluxvae.errors import CheckpointError

__all__ = ["config_of_shapes", "describe", "fits"]

_MOST_BLOCKS = 16
"""The largest number of residual blocks a level may have. No autoencoder has nearly as many: more means damage."""
_STATISTICS = ("bn.running_mean", "bn.running_var")


def config_of_shapes(vae: Vae, where: str) -> tuple[dict[str, Any], list[Family]]:
    """Read from the tensors what they say about the config, and which families they may belong to.

    Args:
        vae: the decoder as `find_vae` found it.
        where: the file, for error messages.

    Returns:
        The config, as far as the shapes determine it, and the families whose VAE has such tensors, the likeliest first.

    Raises:
        CheckpointError: the tensors from which the config is read are missing or have another shape than a
            convolution's, or there are more levels than any VAE has.
    """
    if vae.preview:
        width, channels = vae.shapes["decoder.layers.0.weight"][:2]
        config: dict[str, Any] = {
            "_class_name": "AutoencoderTiny",
            "latent_channels": channels,
            "decoder_block_out_channels": [width] * 4,
        }
        if vae.encoder_widths is not None:
            config["encoder_block_out_channels"] = list(vae.encoder_widths)
        return config, [
            family
            for family in FAMILIES.values()
            # ERNIE's differs from FLUX.2's only in batch_norm_eps, which a preview does not use: one of them is enough.
            if family.channels == channels and family.levels == 4 and family.name != "ernie"
        ]
    channels, widths, blocks = _network(vae.shapes, where)
    post_quant = "post_quant_conv.weight" in vae.shapes
    flux2 = channels == 32 and all(name in vae.shapes for name in _STATISTICS)
    config = {
        "_class_name": "AutoencoderKLFlux2" if flux2 else "AutoencoderKL",
        "in_channels": 3,
        "out_channels": vae.shapes.get("decoder.conv_out.weight", (3,))[0],
        "latent_channels": channels,
        "block_out_channels": list(widths),
        "layers_per_block": blocks - 1,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "mid_block_add_attention": any(name.startswith("decoder.mid_block.attentions.") for name in vae.shapes),
        "use_post_quant_conv": post_quant,
        "use_quant_conv": "quant_conv.weight" in vae.encoder if vae.encoder else post_quant,
    }
    if flux2 and vae.encoder_widths is not None and vae.encoder_widths != widths:
        config |= {"block_out_channels": list(vae.encoder_widths), "decoder_block_out_channels": list(widths)}
    # CogView's and GLM-Image's VAEs have FLUX.1's sizes but no attention; they are no family that is known here.
    attention = config["mid_block_add_attention"]
    fitting = [
        family
        for family in FAMILIES.values()
        if attention
        and config["out_channels"] == 3
        and family.channels == channels
        and (family.batch_norm_eps is not None) == flux2
        and family.post_quant_conv == post_quant
        and family.levels == len(widths)
    ]
    return config, fitting


def describe(vae: Vae) -> str:
    """Describe in words what the tensors show of a VAE, for messages."""
    if vae.preview:
        return f"a preview's, with {vae.shapes['decoder.layers.0.weight'][1]} latent channels"
    shapes = vae.shapes
    channels = shapes["decoder.conv_in.weight"][1]
    words = f"a VAE with {channels} latent channels"
    if channels == 32 and not all(name in shapes for name in _STATISTICS):
        words += ", as FLUX.2's has, but without its statistics bn.running_mean and bn.running_var"
    post_quant = "post_quant_conv.weight" in shapes
    levels = len({name.split(".")[2] for name in shapes if name.startswith("decoder.up_blocks.")})
    attention = any(name.startswith("decoder.mid_block.attentions.") for name in shapes)
    words += f", {'with' if post_quant else 'without'} post_quant_conv, {levels} levels"
    return words if attention else f"{words}, no attention"


def fits(config: Mapping[str, Any], vae: Vae) -> bool:
    """Return whether a config.json that lies beside a single file may describe that file.

    It may where its class and its sizes are those that the tensors have; otherwise it belongs to something else.
    """
    found, _ = config_of_shapes(vae, "")
    names = ("_class_name", "latent_channels") if vae.preview else (
        "_class_name", "latent_channels", "block_out_channels", "layers_per_block",
    )  # fmt: skip
    widths = config.get("decoder_block_out_channels") or config.get("block_out_channels")
    its = {**config, "block_out_channels": widths}
    theirs = {**found, "block_out_channels": found.get("decoder_block_out_channels") or found.get("block_out_channels")}
    return all(its.get(name) == theirs[name] for name in names)


def _network(shapes: Mapping[str, tuple[int, ...]], where: str) -> tuple[int, tuple[int, ...], int]:
    """Return the latent channels, the levels' widths (full resolution first), and the residual blocks per level."""
    levels: dict[int, set[int]] = {}
    for name in shapes:
        if match := re.match(r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.", name):
            levels.setdefault(int(match[1]), set()).add(int(match[2]))
    blocks = len(levels.get(0, ()))
    if not levels or len(levels) > MOST_LEVELS or set(levels) != set(range(len(levels))) or blocks > _MOST_BLOCKS:
        raise CheckpointError(
            f"checkpoint: {where} has decoder.conv_in.weight, but not the levels of a VAE's decoder (BFL's "
            "decoder.up.0.block.0.conv1.weight, diffusers' decoder.up_blocks.0.resnets.0.conv1.weight); it is damaged "
            "or another model's"
        )
    widths = []
    for level in range(len(levels)):
        shape = shapes.get(f"decoder.up_blocks.{level}.resnets.0.conv1.weight", ())
        if len(shape) != 4:
            raise CheckpointError(
                f"checkpoint: {where} lacks decoder.up_blocks.{level}.resnets.0.conv1.weight, or has it in "
                "another shape than a convolution's; it is damaged or another model's: download it again"
            )
        widths.append(shape[0])
    return shapes["decoder.conv_in.weight"][1], tuple(reversed(widths)), blocks
