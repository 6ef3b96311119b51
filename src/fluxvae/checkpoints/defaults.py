"""The values that diffusers' autoencoders use for settings a config leaves out, and a check that nothing is unknown.

A decoder can be planned without diffusers only if every setting of its config is understood here. `complete` fills in
the defaults and says whether that is so. The defaults come from diffusers 0.42.1:
``autoencoders/autoencoder_kl.py``, ``autoencoder_kl_flux2.py``, ``autoencoder_kl_qwenimage.py``,
``autoencoder_kl_wan.py``, ``autoencoder_tiny.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fluxvae.checkpoints.families import FAMILIES

__all__ = ["DEFAULTS", "complete"]

_KL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
_FRAMES: dict[str, Any] = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
    "latents_mean": list(FAMILIES["qwen-image"].latents_mean or ()),
    "latents_std": list(FAMILIES["qwen-image"].latents_std or ()),
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": _KL,
    "AutoencoderKLFlux2": {
        **{name: _KL[name] for name in ("in_channels", "out_channels", "act_fn", "norm_num_groups")},
        **{name: _KL[name] for name in ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")},
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "decoder_block_out_channels": None,
        "layers_per_block": 2,
        "latent_channels": 32,
        "sample_size": 1024,
        "batch_norm_eps": 1e-4,
        "batch_norm_momentum": 0.1,
        "patch_size": (2, 2),
    },
    "AutoencoderKLQwenImage": {**_FRAMES, "input_channels": 3},
    "AutoencoderKLWan": {
        **_FRAMES,
        "decoder_base_dim": None,
        "is_residual": False,
        "in_channels": 3,
        "out_channels": 3,
        "patch_size": None,
        "scale_factor_temporal": 4,
        "scale_factor_spatial": 8,
    },
    "AutoencoderTiny": {
        "in_channels": 3,
        "out_channels": 3,
        "encoder_block_out_channels": (64, 64, 64, 64),
        "decoder_block_out_channels": (64, 64, 64, 64),
        "act_fn": "relu",
        "upsample_fn": "nearest",
        "latent_channels": 4,
        "upsampling_scaling_factor": 2,
        "num_encoder_blocks": (1, 3, 3, 3),
        "num_decoder_blocks": (3, 3, 3, 1),
        "latent_magnitude": 3,
        "latent_shift": 0.5,
        "force_upcast": False,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    },
}
"""For each class of diffusers', its default for every setting that a config may leave out."""


def complete(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the config with diffusers' defaults for the settings it leaves out.

    Returns:
        None where the class, a setting or a value is not known here. Then only diffusers can tell what it means.
    """
    kind = config.get("_class_name")
    if kind not in DEFAULTS:
        return None
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    if kind == "AutoencoderTiny":
        given.pop("block_out_channels", None)  # diffusers adds it to the config itself, and derives it anew each time
    whole = {**DEFAULTS[kind], **given}
    try:
        known = whole.keys() == DEFAULTS[kind].keys() and _KNOWN[kind](whole)
    except TypeError:  # a value that should be a list is none
        known = False
    return whole if known else None


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _counts(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(_count, value))


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_known(config: dict[str, Any]) -> bool:
    widths, own = config["block_out_channels"], config.get("decoder_block_out_channels")
    levels = len(widths) if _counts(widths) else 0
    groups = config["norm_num_groups"]
    return (
        levels > 0
        and _count(groups)
        and (own is None or (_counts(own) and len(own) == levels))
        and all(width % groups == 0 for width in (*widths, *(own or ())))
        and list(config["up_block_types"]) == ["UpDecoderBlock2D"] * levels
        and list(config["down_block_types"]) == ["DownEncoderBlock2D"] * levels
        and all(_count(config[name]) for name in ("in_channels", "out_channels", "latent_channels", "layers_per_block"))
        and (_count(config["sample_size"]) or _counts(config["sample_size"]))
        and all(isinstance(config[name], bool) for name in ("use_quant_conv", "use_post_quant_conv"))
        and isinstance(config["mid_block_add_attention"], bool)
        and config["act_fn"] == "silu"
        and all(config.get(name) is None or _number(config[name]) for name in ("shift_factor", "batch_norm_eps"))
        and _number(config.get("scaling_factor", 1.0))
        and (config.get("patch_size") is None or list(config["patch_size"]) == [2, 2])
    )


def _tiny_is_known(config: dict[str, Any]) -> bool:
    lists = ("encoder_block_out_channels", "decoder_block_out_channels", "num_encoder_blocks", "num_decoder_blocks")
    numbers = ("in_channels", "out_channels", "latent_channels", "upsampling_scaling_factor")
    return (
        all(_counts(config[name]) for name in lists)
        and len(set(config["decoder_block_out_channels"])) == 1
        and len(config["decoder_block_out_channels"]) == len(config["num_decoder_blocks"])
        and len(config["encoder_block_out_channels"]) == len(config["num_encoder_blocks"])
        and all(_count(config[name]) for name in numbers)
        and all(_number(config[name]) for name in ("scaling_factor", "shift_factor"))
        and config["act_fn"] == "relu"
        and config["upsample_fn"] == "nearest"
    )


def _frames_are_known(config: dict[str, Any]) -> bool:
    counts = [config[name] for name in ("input_channels", "in_channels", "out_channels") if name in config]
    timed, levels = config["temperal_downsample"], len(config["dim_mult"])
    return (
        _counts(config["dim_mult"])
        and all(_count(config[name]) for name in ("base_dim", "z_dim", "num_res_blocks"))
        and (config.get("decoder_base_dim") is None or _count(config["decoder_base_dim"]))
        and all(map(_count, counts))
        and len(timed) == levels - 1
        and all(isinstance(one, bool) for one in timed)
        and list(config["attn_scales"]) == []  # diffusers' encoder has further blocks then, and its decoder has not
        and _number(config["dropout"])
        and all(len(config[name]) == config["z_dim"] for name in ("latents_mean", "latents_std"))
        and all(_number(one) for name in ("latents_mean", "latents_std") for one in config[name])
        and config.get("is_residual", False) is False
        and config.get("patch_size") is None
        # What diffusers computes its tiles with; the network itself says how much smaller the latents are.
        and config.get("scale_factor_spatial", 2 ** (levels - 1)) == 2 ** (levels - 1)
        and _count(config.get("scale_factor_temporal", 4))
    )


_KNOWN = {
    "AutoencoderKL": _is_known,
    "AutoencoderKLFlux2": _is_known,
    "AutoencoderKLQwenImage": _frames_are_known,
    "AutoencoderKLWan": _frames_are_known,
    "AutoencoderTiny": _tiny_is_known,
}
