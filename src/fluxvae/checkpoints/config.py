"""Works out the config of a VAE from the shapes of its decoder's tensors, because a single file has no config.json."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from fluxvae.checkpoints.defaults import DEFAULTS
from fluxvae.checkpoints.families import FAMILIES, Family
from fluxvae.checkpoints.layouts import MOST_LEVELS, Vae
from fluxvae.errors import CheckpointError

__all__ = ["PICTURES", "config_of_shapes", "describe", "fits", "sizes"]

_MOST_BLOCKS = 16
"""The largest number of residual blocks a level may have. No autoencoder has nearly as many: more means damage."""
_STATISTICS = ("bn.running_mean", "bn.running_var")
PICTURES = {3: "RGB", 4: "RGBA"}
"""How many channels a picture may have, and what they are."""


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
        if "encoder.layers.0.weight" in vae.encoder_shapes:
            config["encoder_block_out_channels"] = [vae.encoder_shapes["encoder.layers.0.weight"][0]] * 4
        return config, [
            family
            for family in FAMILIES.values()
            if family.preview and (family.channels, family.levels) == (channels, 4)
        ]
    channels, widths, blocks = _network(vae.shapes, where)
    if vae.frames:
        return _config_of_frames(vae, channels, widths, blocks, where)
    post_quant = "post_quant_conv.weight" in vae.shapes
    flux2 = channels == 32 and all(name in vae.shapes for name in _STATISTICS)
    given = vae.encoder_shapes.get("encoder.conv_in.weight", ())
    config = {
        "_class_name": "AutoencoderKLFlux2" if flux2 else "AutoencoderKL",
        "in_channels": given[1] if len(given) == 4 else 3,
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
    encoder_widths = _widths(vae.encoder_shapes, [f"down_blocks.{level}.resnets.0" for level in range(MOST_LEVELS)])
    if flux2 and encoder_widths and encoder_widths != widths:
        config |= {"block_out_channels": list(encoder_widths), "decoder_block_out_channels": list(widths)}
    # CogView's and GLM-Image's VAEs have FLUX.1's sizes but no attention; they are no family that is known here.
    attention = config["mid_block_add_attention"]
    fitting = [
        family
        for family in FAMILIES.values()
        if attention
        and config["out_channels"] == 3
        and config["_class_name"] in family.classes
        and family.channels == channels
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
    if vae.frames:
        return f"{words}, whose convolutions have an axis of time, {levels} levels"
    words += f", {'with' if post_quant else 'without'} post_quant_conv, {levels} levels"
    return words if attention else f"{words}, no attention"


def fits(config: Mapping[str, Any], vae: Vae) -> bool:
    """Return whether a config.json that lies beside a single file may describe that file.

    It may where its class and its sizes are those that the tensors have; otherwise it belongs to something else.
    """
    found, _ = config_of_shapes(vae, "")
    if vae.frames:
        return _sizes_of_frames(config) == _sizes_of_frames(found)
    names = ("_class_name", "latent_channels") if vae.preview else (
        "_class_name", "latent_channels", "block_out_channels", "layers_per_block",
    )  # fmt: skip
    widths = config.get("decoder_block_out_channels") or config.get("block_out_channels")
    its = {**config, "block_out_channels": widths}
    theirs = {**found, "block_out_channels": found.get("decoder_block_out_channels") or found.get("block_out_channels")}
    return all(its.get(name) == theirs[name] for name in names)


def sizes(config: Mapping[str, Any]) -> tuple[list[int], int | None]:
    """Return the sizes of a network by its config, in whatever words its class has for them.

    Returns:
        The widths of the decoder's levels, full resolution first; and how many residual blocks each level has in the
        encoder (one more in the decoder), None where that differs between levels.
    """
    its = {**DEFAULTS[config["_class_name"]], **config}
    if "dim_mult" in its:
        base = its.get("decoder_base_dim") or its["base_dim"]
        return [base * factor for factor in its["dim_mult"]], its["num_res_blocks"]
    return list(its.get("decoder_block_out_channels") or its["block_out_channels"]), its.get("layers_per_block")


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
            "decoder.up.0.block.0.conv1.weight, diffusers' decoder.up_blocks.0.resnets.0.conv1.weight, Wan's "
            "decoder.upsamples.0.residual.2.weight); it is damaged or another model's"
        )
    widths = []
    for level in range(len(levels)):
        shape = shapes.get(f"decoder.up_blocks.{level}.resnets.0.conv1.weight", ())
        if len(shape) != len(shapes["decoder.conv_in.weight"]):
            raise CheckpointError(
                f"checkpoint: {where} lacks decoder.up_blocks.{level}.resnets.0.conv1.weight, or has it in "
                "another shape than a convolution's; it is damaged or another model's: download it again"
            )
        widths.append(shape[0])
    return shapes["decoder.conv_in.weight"][1], tuple(reversed(widths)), blocks


def _config_of_frames(
    vae: Vae, channels: int, widths: tuple[int, ...], blocks: int, where: str
) -> tuple[dict[str, Any], list[Family]]:
    """Do what `config_of_shapes` does for a VAE whose convolutions have an axis of time: Qwen-Image's and Wan 2.1's.

    diffusers has two classes for this network. Qwen-Image's has one number of channels and one of widths for both ways,
    so Wan's is taken only where the halves differ.
    """
    shapes, theirs = vae.shapes, vae.encoder_shapes
    # The encoder's blocks are numbered through: of each level the residual blocks, one less than in the decoder, and
    # then the resampling.
    own = _widths(theirs, [f"down_blocks.{level * blocks}" for level in range(len(widths))])
    first = theirs.get("encoder.conv_in.weight", ())
    base = (first[0] if len(first) == 5 else 0) or 1
    factors = [width // base for width in own]
    decoder_base = widths[0] // (factors[0] or 1) if own else 0
    if [decoder_base * factor for factor in factors] != list(widths):  # no encoder, or none that goes with this decoder
        base = decoder_base = math.gcd(*widths) or 1
        factors = [width // base for width in widths]
    last = shapes.get("decoder.conv_out.weight", ())
    out = last[0] if len(last) == 5 else 3  # a tensor that is missing or damaged is found later, by its name
    given = first[1] if len(first) == 5 else out
    for name, count in (("conv_out", out), ("conv_in", given)):
        if count not in PICTURES:
            raise CheckpointError(
                f"checkpoint: {where} has {count} channels of pixels ({name}); expected 3 (RGB) or 4 (RGBA): it is a "
                "VAE whose pixels other software rearranges, such as Wan's upscaling one: use the plain VAE"
            )
    config: dict[str, Any] = {
        "_class_name": "AutoencoderKLQwenImage",
        "base_dim": base,
        "z_dim": channels,
        "dim_mult": factors,
        "num_res_blocks": blocks - 1,
        "temperal_downsample": [*DEFAULTS["AutoencoderKLQwenImage"]["temperal_downsample"]],  # as all that there are
    }
    if (decoder_base, given) == (base, out):
        config["input_channels"] = out
    else:
        config |= {
            "_class_name": "AutoencoderKLWan", "decoder_base_dim": decoder_base, "in_channels": given,
            "out_channels": out, "scale_factor_spatial": 2 ** (len(widths) - 1),
        }  # fmt: skip
    return config, [
        family
        for family in FAMILIES.values()
        if config["_class_name"] in family.classes and (family.channels, family.levels) == (channels, len(widths))
    ]


def _sizes_of_frames(config: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return what two configs of one network have in common, whichever of its two classes they name."""
    kind = config.get("_class_name")
    if kind not in ("AutoencoderKLQwenImage", "AutoencoderKLWan"):
        return None
    its = {**DEFAULTS[kind], **config}
    try:
        return its["z_dim"], *sizes(config), its.get("out_channels", its.get("input_channels"))
    except TypeError:  # a value that should be a list is none
        return None


def _widths(shapes: Mapping[str, tuple[int, ...]], blocks: list[str]) -> tuple[int, ...]:
    """Return the widths of those of the encoder's blocks, by their names, that are there."""
    return tuple(shapes[key][0] for block in blocks if shapes.get(key := f"encoder.{block}.conv1.weight"))
