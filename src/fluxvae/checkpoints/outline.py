"""The modules of diffusers' decoders without diffusers: their names, shapes and settings, and no arithmetic.

Importing diffusers takes three times as long as importing PyTorch, and what a checkpoint holds or a decode would need
follows from shapes alone. `outline` makes the decoder half of an autoencoder from its config, on the ``meta`` device,
as diffusers 0.42.1 would (``autoencoders/autoencoder_kl.py``, ``autoencoder_kl_flux2.py``, ``autoencoder_tiny.py``,
``vae.py``): same class names, same ``state_dict``, same attributes where the engines read them. Only configs of which
everything is known have an outline; for any other the caller builds diffusers' own module.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn

__all__ = ["DEFAULTS", "Outline", "outline"]

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
"""Of every setting that a config may leave out, diffusers' own."""

_META: dict[str, Any] = {"device": "meta", "dtype": torch.float32}


def outline(config: Mapping[str, Any]) -> Outline | None:
    """The decoder half of the autoencoder that this config describes; None where something in it is not known here."""
    kind = config.get("_class_name")
    if kind not in DEFAULTS:
        return None
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    if kind == "AutoencoderTiny":
        given.pop("block_out_channels", None)  # diffusers writes it, and derives it anew
    whole = {**DEFAULTS[kind], **given}
    try:
        known = whole.keys() == DEFAULTS[kind].keys() and _KNOWN[kind](whole)
    except TypeError:  # no list where one belongs
        known = False
    if not known:
        return None
    kinds = {
        "AutoencoderKL": AutoencoderKL,
        "AutoencoderKLFlux2": AutoencoderKLFlux2,
        "AutoencoderTiny": AutoencoderTiny,
    }
    return kinds[kind](whole)


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


_KNOWN = {"AutoencoderKL": _is_known, "AutoencoderKLFlux2": _is_known, "AutoencoderTiny": _tiny_is_known}


class Outline(nn.Module):
    """What the outlines share with diffusers' ``ModelMixin``."""

    config: dict[str, Any]

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.use_tiling = self.use_slicing = False

    @property
    def device(self) -> torch.device:
        """Of its tensors."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of its tensors."""
        return next(self.parameters()).dtype


class AutoencoderKL(Outline):
    """The decoder, and what maps latents to it."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        channels = config["latent_channels"]
        self.encoder = self.quant_conv = None
        self.decoder = Decoder(config)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1, **_META) if config["use_post_quant_conv"] else None


class AutoencoderKLFlux2(AutoencoderKL):
    """With the statistics of its latents."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.bn = nn.BatchNorm2d(4 * config["latent_channels"], config["batch_norm_eps"], affine=False, **_META)


class Decoder(nn.Module):
    """The layers, from the latents on."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        widths = list(reversed(config.get("decoder_block_out_channels") or config["block_out_channels"]))
        groups = config["norm_num_groups"]
        self.conv_in = _conv(config["latent_channels"], widths[0])
        self.mid_block = UNetMidBlock2D(widths[0], groups, config["mid_block_add_attention"])
        self.up_blocks = nn.ModuleList(
            UpDecoderBlock2D(before, width, config["layers_per_block"] + 1, groups, upsample=level < len(widths) - 1)
            for level, (before, width) in enumerate(pairwise([widths[0], *widths]))
        )
        self.conv_norm_out = _norm(widths[-1], groups)
        self.conv_act = nn.SiLU()
        self.conv_out = _conv(widths[-1], config["out_channels"])


class UNetMidBlock2D(nn.Module):
    """A residual block, attention, a residual block."""

    def __init__(self, width: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(width, groups) if attention else None])  # type: ignore[list-item]
        self.resnets = nn.ModuleList(ResnetBlock2D(width, width, groups) for _ in range(2))


class UpDecoderBlock2D(nn.Module):
    """Residual blocks, then twice the size."""

    def __init__(self, before: int, width: int, blocks: int, groups: int, *, upsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock2D(width if i else before, width, groups) for i in range(blocks))
        self.upsamplers = nn.ModuleList([Upsample2D(width)]) if upsample else None


class ResnetBlock2D(nn.Module):
    """As diffusers makes it in a VAE: without a time embedding."""

    def __init__(self, before: int, width: int, groups: int) -> None:
        super().__init__()
        self.upsample = self.downsample = self.time_emb_proj = None
        self.time_embedding_norm, self.output_scale_factor = "default", 1.0
        self.norm1, self.conv1 = _norm(before, groups), _conv(before, width)
        self.norm2, self.conv2 = _norm(width, groups), _conv(width, width)
        self.dropout, self.nonlinearity = nn.Dropout(0.0), nn.SiLU()
        self.conv_shortcut = nn.Conv2d(before, width, 1, **_META) if before != width else None


class Attention(nn.Module):
    """Of one head, over all pixels."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.heads, self.is_cross_attention, self.scale = 1, False, width**-0.5
        self.residual_connection, self.rescale_output_factor = True, 1
        self.group_norm = _norm(width, groups)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, **_META) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width, **_META), nn.Dropout(0.0)])


class Upsample2D(nn.Module):
    """Nearest, and a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.use_conv, self.use_conv_transpose, self.interpolate, self.norm, self.name = True, False, True, None, "conv"
        self.conv = _conv(width, width)


class AutoencoderTiny(Outline):
    """The decoder of a preview."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.encoder = None
        self.decoder = DecoderTiny(config)


class DecoderTiny(nn.Module):
    """Convolutions one after another."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, blocks = config["decoder_block_out_channels"][0], config["num_decoder_blocks"]
        layers: list[nn.Module] = [_conv(config["latent_channels"], width), nn.ReLU()]
        for level, count in enumerate(blocks):
            last = level == len(blocks) - 1
            layers += [AutoencoderTinyBlock(width) for _ in range(count)]
            layers += [] if last else [nn.Upsample(scale_factor=config["upsampling_scaling_factor"])]
            layers.append(nn.Conv2d(width, config["out_channels"] if last else width, 3, padding=1, bias=last, **_META))
        self.layers = nn.Sequential(*layers)

    def add_pools(self, width: int, blocks: int) -> None:
        """TAEF2's, as `previews.add_pools`."""
        for index in range(2, 2 + blocks):
            self.layers[index].pool = nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False, **_META),
                nn.GroupNorm(4, 4 * width, **_META),
                nn.ReLU(),
                nn.Conv2d(4 * width, width, 1, bias=False, **_META),
            )


class AutoencoderTinyBlock(nn.Module):
    """Three convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width))


def _conv(before: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(before, width, 3, padding=1, **_META)


def _norm(width: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, width, eps=1e-6, **_META)
