"""Says by name which VAE a file or a config.json holds that is not decoded here, and what is taken instead.

A config.json tells it by its class, and a single file by tensors that no other VAE has. The names of tensors are those
of diffusers' modules (0.42.1), and for Wan 2.2 and LTX-Video also those of the models' own files, by which ComfyUI's
``sd.py`` tells them; TAEHV's are those of madebyollin's ``taehv.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from fluxvae.checkpoints.entries import Entry

__all__ = ["TAKEN", "no_vae", "stranger", "told_by_config"]

TAKEN = (
    "taken are the VAEs of FLUX, Stable Diffusion, Qwen-Image and Wan 2.1, as a diffusers folder with its config.json "
    "or as a single file such as ae.safetensors, qwen_image_vae.safetensors or wan_2.1_vae.safetensors"
)
"""What opens, in words, for the end of a refusal."""


class _Stranger(NamedTuple):
    model: str
    """diffusers' class of this VAE; empty where it has none."""
    words: str
    telling: tuple[str, ...] = ()
    """Names of tensors, without their prefix, that only this VAE has all of. Without any, the class alone tells it."""


_WAN22 = "Wan 2.2's VAE, which has 48 latent channels, pixels in patches and shortcuts around its levels"
_QWEN21 = "Qwen-Image 2.1's VAE, which is 16 times smaller and has shortcuts around its levels"
_STRANGERS = (
    _Stranger("AutoencoderKLQwenImage21", _QWEN21),
    _Stranger("", _WAN22, ("decoder.up_blocks.0.upsampler.resample.1.weight",)),
    _Stranger("", _WAN22, ("decoder.upsamples.0.upsamples.0.residual.2.weight",)),
    _Stranger("AutoencoderKLTemporalDecoder", "Stable Video Diffusion's VAE", ("decoder.time_conv_out.weight",)),
    _Stranger("AutoencoderKLAllegro", "Allegro's VAE", ("decoder.temp_conv_in.weight",)),
    _Stranger("AutoencoderKLMochi", "Mochi's VAE", ("decoder.block_in.resnets.0.norm1.norm_layer.weight",)),
    _Stranger("AutoencoderKLMagvit", "EasyAnimate's VAE", ("decoder.mid_block.convs.0.norm1.weight",)),
    _Stranger("AutoencoderKLCosmos", "Cosmos's VAE", ("decoder.conv_in.conv_s.weight",)),
    _Stranger("AutoencoderKLCogVideoX", "CogVideoX's VAE", ("decoder.mid_block.resnets.0.norm1.norm_layer.weight",)),
    _Stranger(
        "AutoencoderKLKVAEVideo",
        "Kandinsky's video VAE",
        ("decoder.mid.block_1.norm1.norm_layer.norm_layer.weight",),
    ),
    _Stranger("AutoencoderKLKVAE", "Kandinsky's VAE", ("decoder.mid.block_1.norm1.norm_layer.weight",)),
    _Stranger("AutoencoderVidTok", "VidTok's VAE", ("decoder.mid.block_1.norm1.norm.weight",)),
    _Stranger(
        "AutoencoderKLHunyuanVideo15",
        "HunyuanVideo 1.5's VAE or that of HunyuanImage's refiner",
        ("decoder.conv_in.conv.weight", "decoder.up_blocks.0.resnets.0.norm1.gamma"),
    ),
    _Stranger("AutoencoderKLHunyuanImageRefiner", "the VAE of HunyuanImage's refiner"),
    _Stranger("AutoencoderKLHunyuanImage", "HunyuanImage 2.1's VAE"),
    _Stranger(
        "AutoencoderKLHunyuanVideo",
        "HunyuanVideo's VAE",
        ("decoder.conv_in.conv.weight", "decoder.mid_block.attentions.0.group_norm.weight"),
    ),
    _Stranger(
        "AutoencoderKLLTXVideo",
        "LTX-Video's or LTX-2's VAE",
        ("decoder.conv_in.conv.weight", "decoder.mid_block.resnets.0.conv1.conv.weight"),
    ),
    _Stranger("", "LTX-Video's or LTX-2's VAE", ("decoder.up_blocks.0.res_blocks.0.conv1.conv.weight",)),
    _Stranger("AutoencoderKLLTX2Video", "LTX-2's VAE"),
    _Stranger("AutoencoderDC", "Sana's VAE"),
    _Stranger(
        "",
        "TAEHV's preview of a video model (taew2_1 and others)",
        ("decoder.3.conv.0.weight", "decoder.7.conv.weight"),
    ),
)
"""All that are known by name. The order matters: the first whose tensors are all there is the one."""
_LAST = ("decoder.conv_out.weight", "decoder.head.2.weight")
"""The last convolution of a decoder, by diffusers' name and by Wan's."""


def stranger(entries: Mapping[str, Entry], prefix: str | None = None) -> str:
    """Return in words which VAE that is not decoded here these tensors are; an empty text where they are none such.

    Args:
        entries: the tensors of a file by the file's names.
        prefix: only tensors whose names begin with this are looked at. None: whatever stands before the names.
    """
    for one in _STRANGERS:
        for before in _prefixes(entries, one.telling[0]) if one.telling else ():
            if prefix in (None, before) and all(f"{before}{name}" in entries for name in one.telling):
                return _QWEN21 if one.words == _WAN22 and _is_still(entries, before) else one.words
    return ""


def told_by_config(config: Mapping[str, Any]) -> str:
    """Return in words which VAE that is not decoded here a config.json describes; empty where it is none such."""
    kind = config.get("_class_name")
    if kind == "AutoencoderKLWan" and (config.get("is_residual") or config.get("patch_size") is not None):
        return _WAN22
    return next((one.words for one in _STRANGERS if kind and one.model == kind), "")


def no_vae(entries: Mapping[str, Entry], where: str) -> str:
    """Return the message for a file in which no decoder was found that is taken here."""
    if what := stranger(entries):
        return f"checkpoint: {where} holds {what}; it is not decoded here: {TAKEN}"
    named = ", ".join(list(entries)[:3]) or "none"
    video = [name for name, entry in entries.items() if len(entry.shape) == 5]
    kind = ""
    encoder = any(re.fullmatch(r"(?:.*\.)?encoder\.conv(?:_in|1)\.weight", name) for name in entries)
    if encoder and not any("decoder." in name for name in entries):
        kind = " It holds an encoder only."
    elif any("decoder" in name or name.startswith("conv") for name in video):
        kind = f" {video[0]} is a convolution over time: it is a video VAE of a kind that is not known here."
    return (
        f"checkpoint: {where} holds {len(entries)} tensors ({named}, ...), but no decoder.conv_in.weight (Wan's names: "
        f"decoder.conv1.weight), whatever stands before it.{kind} Expected a VAE or a preview such as taef2.safetensors"
        f"; {TAKEN}: pass the VAE's file, or the folder of the pipeline"
    )


def _prefixes(entries: Mapping[str, Entry], name: str) -> list[str]:
    return [whole.removesuffix(name) for whole in entries if whole == name or whole.endswith(f".{name}")]


def _is_still(entries: Mapping[str, Entry], prefix: str) -> bool:
    """Return whether the last convolution has no axis of time, or one of length 1, as only Qwen-Image 2.1's has."""
    found = next((entries[f"{prefix}{name}"].shape for name in _LAST if f"{prefix}{name}" in entries), ())
    return len(found) == 4 or (len(found) == 5 and found[2] == 1)
