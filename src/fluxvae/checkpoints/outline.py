"""Describes the decoder of a config by shapes and records of layers, without PyTorch, diffusers or any module.

Importing those two takes seconds, while the tensors that a checkpoint must hold, and the memory that a decode needs,
follow from the config alone. The structure is that of diffusers 0.42.1: ``autoencoders/vae.py``,
``autoencoder_kl.py``, ``autoencoder_kl_flux2.py``, ``autoencoder_tiny.py``. Only a config in which everything is known
has an outline; for any other the caller builds diffusers' own module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fluxvae.checkpoints.defaults import complete
from fluxvae.engine.layers import Layer
from fluxvae.engine.layers.attention import Attention
from fluxvae.engine.layers.conv_in import ConvIn
from fluxvae.engine.layers.conv_out import ConvOut
from fluxvae.engine.layers.resnet import Resnet
from fluxvae.engine.layers.upsample import Upsample
from fluxvae.engine.network import Network
from fluxvae.engine.records import Conv, Linear, Norm, Projections, records_of

__all__ = ["Outline", "outline"]

_NO_MODULE: Any = None
_EPS = 1e-6
"""The eps of every GroupNorm in diffusers' decoder."""


@dataclass(frozen=True)
class Outline:
    """What is known of the decoder half of an autoencoder from its config."""

    config: dict[str, Any]
    """The complete config, with diffusers' defaults for the settings that were left out."""
    shapes: dict[str, tuple[int, ...]]
    """The shapes of the decoder's tensors by their names in diffusers' ``state_dict``; the encoder's are left out."""
    network: Network | None
    """The layers, as records without modules. None for a preview, which the exact engine does not decode."""


def outline(config: Mapping[str, Any], *, pools: bool = False) -> Outline | None:
    """Describe the decoder half of the autoencoder that this config stands for.

    Args:
        config: a config of diffusers, which may leave out settings.
        pools: the preview has TAEF2's pooling branches, which diffusers' ``AutoencoderTiny`` lacks (`previews`).

    Returns:
        None where something in the config is not known here.
    """
    whole = complete(config)
    if whole is None:
        return None
    if config["_class_name"] == "AutoencoderTiny":
        return Outline(whole, _tiny_shapes(whole, pools), None)
    network = _network(whole)
    shapes = dict(_shapes(network))
    if config["_class_name"] == "AutoencoderKLFlux2":
        features = 4 * whole["latent_channels"]
        shapes |= {"bn.running_mean": (features,), "bn.running_var": (features,), "bn.num_batches_tracked": ()}
    return Outline(whole, shapes, network)


# -- AutoencoderKL and AutoencoderKLFlux2 --------------------------------------------------------------------------


def _network(config: dict[str, Any]) -> Network:
    widths = list(reversed(config.get("decoder_block_out_channels") or config["block_out_channels"]))
    groups, latent = config["norm_num_groups"], config["latent_channels"]
    first, last = widths[0], widths[-1]
    layers: list[Layer] = [_resnet("decoder.mid_block.resnets.0", first, first, groups)]
    if config["mid_block_add_attention"]:
        layers.append(_attention("decoder.mid_block.attentions.0", first, groups))
    layers.append(_resnet("decoder.mid_block.resnets.1", first, first, groups))
    for level, (before, width) in enumerate(pairwise([first, *widths])):
        name = f"decoder.up_blocks.{level}"
        for index in range(config["layers_per_block"] + 1):
            layers.append(_resnet(f"{name}.resnets.{index}", width if index else before, width, groups))
        if level < len(widths) - 1:
            layers.append(Upsample(f"{name}.upsamplers.0", _conv(f"{name}.upsamplers.0.conv", width, width)))
    conv_in, conv_out = _conv("decoder.conv_in", latent, first), _conv("decoder.conv_out", last, config["out_channels"])
    pointwise = _conv("post_quant_conv", latent, latent, 1) if config["use_post_quant_conv"] else None
    return Network(
        ConvIn(conv_in.name, pointwise, conv_in),
        tuple(layers),
        ConvOut(conv_out.name, _norm("decoder.conv_norm_out", last, groups), conv_out),
    )


def _resnet(name: str, before: int, width: int, groups: int) -> Resnet:
    return Resnet(
        name,
        _norm(f"{name}.norm1", before, groups),
        _conv(f"{name}.conv1", before, width),
        _norm(f"{name}.norm2", width, groups),
        _conv(f"{name}.conv2", width, width),
        _conv(f"{name}.conv_shortcut", before, width, 1) if before != width else None,
        1.0,
    )


def _attention(name: str, width: int, groups: int) -> Attention:
    query, key, value, out = (
        Linear(f"{name}.{part}", width, width, 1, _NO_MODULE) for part in ("to_q", "to_k", "to_v", "to_out.0")
    )
    projections = Projections(query, key, value, out, width**-0.5, True, 1.0)
    return Attention(name, _norm(f"{name}.group_norm", width, groups), projections)


def _conv(name: str, before: int, width: int, kernel: int = 3) -> Conv:
    return Conv(name, before, width, kernel, _NO_MODULE)


def _norm(name: str, width: int, groups: int) -> Norm:
    return Norm(name, width, groups, _EPS, True, _NO_MODULE)


def _shapes(network: Network) -> Iterator[tuple[str, tuple[int, ...]]]:
    for record in records_of(network):
        if isinstance(record, Conv):
            yield f"{record.name}.weight", record.shape
            yield f"{record.name}.bias", (record.cout,)
        else:
            yield f"{record.name}.weight", (record.channels,)
            yield f"{record.name}.bias", (record.channels,)


# -- AutoencoderTiny -----------------------------------------------------------------------------------------------


def _tiny_shapes(config: dict[str, Any], pools: bool) -> dict[str, tuple[int, ...]]:
    width, blocks = config["decoder_block_out_channels"][0], config["num_decoder_blocks"]
    found: dict[str, tuple[int, ...]] = {}

    def conv(name: str, before: int, after: int, kernel: int = 3, *, bias: bool = True) -> None:
        found[f"{name}.weight"] = (after, before, kernel, kernel)
        if bias:
            found[f"{name}.bias"] = (after,)

    conv("decoder.layers.0", config["latent_channels"], width)
    index = 2  # layer 1 is an activation, which has no tensors
    for level, count in enumerate(blocks):
        for _ in range(count):
            for part in (0, 2, 4):
                conv(f"decoder.layers.{index}.conv.{part}", width, width)
            if pools and level == 0:
                pool = f"decoder.layers.{index}.pool"
                conv(f"{pool}.0", width, 4 * width, 1, bias=False)
                found |= {f"{pool}.1.weight": (4 * width,), f"{pool}.1.bias": (4 * width,)}
                conv(f"{pool}.3", 4 * width, width, 1, bias=False)
            index += 1
        last = level == len(blocks) - 1
        index += not last  # the upsampling before the convolution is a layer too, without tensors
        conv(f"decoder.layers.{index}", width, config["out_channels"] if last else width, bias=last)
        index += 1
    return found
