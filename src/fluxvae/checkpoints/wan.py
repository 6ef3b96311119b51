"""Translates Wan's own names of a VAE's tensors, which ComfyUI keeps in its files, into diffusers' names.

Wan 2.1's VAE has them, and so have Qwen-Image's (``qwen_image_vae.safetensors``) and all that borrow it. A stack of
layers has one number for each layer there: the residual blocks of a level, then its resampling, then the next level.
diffusers keeps these numbers in the encoder, and in the decoder it counts levels, and the blocks within a level.

Source of the names: Wan's ``wan/modules/vae.py``; diffusers' ``convert_wan_vae_to_diffusers``
(``loaders/single_file_utils.py``), which knows the numbers of the published sizes only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["blocks_of_a_level", "diffusers_name", "layers_without_weights"]

_UPSAMPLES = re.compile(r"^decoder\.upsamples\.(\d+)\.")
_SAMPLING = re.compile(r"^decoder\.upsamples\.(\d+)\.resample\.")
_NAMES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"^conv1\."), "quant_conv."),
    (re.compile(r"^conv2\."), "post_quant_conv."),
    (re.compile(r"^(encoder|decoder)\.conv1\."), r"\1.conv_in."),
    (re.compile(r"^(encoder|decoder)\.head\.0\."), r"\1.norm_out."),
    (re.compile(r"^(encoder|decoder)\.head\.2\."), r"\1.conv_out."),
    (re.compile(r"\.middle\.1\."), ".mid_block.attentions.0."),
    (re.compile(r"\.middle\.([02])\."), lambda match: f".mid_block.resnets.{int(match[1]) // 2}."),
    (re.compile(r"^encoder\.downsamples\."), "encoder.down_blocks."),
    (re.compile(r"\.residual\.0\."), ".norm1."),
    (re.compile(r"\.residual\.2\."), ".conv1."),
    (re.compile(r"\.residual\.3\."), ".norm2."),
    (re.compile(r"\.residual\.6\."), ".conv2."),
    (re.compile(r"\.shortcut\."), ".conv_shortcut."),
)
"""What each of Wan's names becomes, but for those of the decoder's levels, which need counting."""
_LAST_CONVOLUTION = re.compile(r"^(.*)\.(residual\.6|head\.2|resample\.1)\.weight$")
"""The last layer of each stack that has layers without weights."""
_SILU: tuple[str, dict[str, Any]] = ("SiLU", {})
_SAME: tuple[str, dict[str, Any]] = ("Identity", {})
_DROPOUT: tuple[str, dict[str, Any]] = ("Dropout", {"p": 0.0})
_ENLARGE: tuple[str, dict[str, Any]] = (
    "Upsample",
    {"size": None, "scale_factor": (2.0, 2.0), "mode": "nearest-exact", "align_corners": None},
)
_PAD: tuple[str, dict[str, Any]] = ("ZeroPad2d", {"padding": (0, 1, 0, 1)})


def blocks_of_a_level(names: Iterable[str]) -> int:
    """Return how many residual blocks each level of the decoder has, by Wan's names without their prefix.

    The first level ends with the first resampling; without any there is one level, and all blocks are its own.
    """
    names = list(names)
    sampling = [int(match[1]) for name in names if (match := _SAMPLING.match(name))]
    every = [int(match[1]) + 1 for name in names if (match := _UPSAMPLES.match(name))]
    return min(sampling) if sampling else max(every, default=0)


def diffusers_name(name: str, blocks: int) -> str:
    """Translate the name of a tensor into diffusers' name for it.

    Args:
        name: the name without its prefix. One that is not Wan's comes back as it is.
        blocks: how many residual blocks each level of the decoder has (`blocks_of_a_level`).
    """

    def counted(match: re.Match[str]) -> str:
        level, index = divmod(int(match[1]), blocks + 1)
        return f"decoder.up_blocks.{level}.{'upsamplers.0' if index == blocks else f'resnets.{index}'}."

    name = _UPSAMPLES.sub(counted, name)
    for pattern, place in _NAMES:
        name = pattern.sub(place, name)
    return name


def layers_without_weights(names: Iterable[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the layers that such a network has besides those with weights, whose tensors have these names.

    Returns:
        For the path of each of them the name of its class in ``torch.nn``, and its attributes that decide what it
        computes.
    """
    names = set(names)
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in names:
        if (match := _LAST_CONVOLUTION.match(name)) is None:
            continue
        path = match[1]
        if match[2] == "residual.6":
            found |= {f"{path}.residual.1": _SILU, f"{path}.residual.4": _SILU, f"{path}.residual.5": _DROPOUT}
            if f"{path}.shortcut.weight" not in names:
                found[f"{path}.shortcut"] = _SAME
        elif match[2] == "head.2":
            found[f"{path}.head.1"] = _SILU
        else:
            found[f"{path}.resample.0"] = _PAD if "downsamples." in path else _ENLARGE
    return found
