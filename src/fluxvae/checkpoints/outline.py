"""Describes one half of a config's VAE by shapes and records of layers, without PyTorch, diffusers or any module.

Importing those two takes seconds, while the tensors that a checkpoint must hold, and the memory that is needed, follow
from the config alone. The structure is that of diffusers 0.42.1: ``autoencoders/vae.py``,
``autoencoder_kl.py``, ``autoencoder_kl_flux2.py``, ``autoencoder_tiny.py``. Only a config in which everything is known
has an outline; for any other the caller builds diffusers' own module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fluxvae.checkpoints.causal_outline import causal_network, causal_shapes
from fluxvae.checkpoints.defaults import complete
from fluxvae.engine.layers import Layer
from fluxvae.engine.layers.attention import Attention
from fluxvae.engine.layers.conv_in import ConvIn
from fluxvae.engine.layers.conv_out import ConvOut
from fluxvae.engine.layers.downsample import Downsample
from fluxvae.engine.layers.resnet import Resnet
from fluxvae.engine.layers.upsample import Upsample
from fluxvae.engine.network import Network, precise
from fluxvae.engine.records import Conv, Linear, Norm, Projections, records_of
from fluxvae.engine.way import DECODE, ENCODE, Way

__all__ = ["Outline", "outline"]

_NO_MODULE: Any = None
_EPS = 1e-6
"""The eps of every GroupNorm in diffusers' decoder."""


@dataclass(frozen=True)
class Outline:
    """What is known of one half of an autoencoder from its config."""

    config: dict[str, Any]
    """The complete config, with diffusers' defaults for the settings that were left out."""
    shapes: dict[str, tuple[int, ...]]
    """The shapes of that half's tensors by their names in diffusers' ``state_dict``."""
    network: Network | None
    """The layers, as records without modules. None for a preview, which the exact engine does not compute."""


def outline(config: Mapping[str, Any], way: Way = DECODE, *, pools: bool = False) -> Outline | None:
    """Describe the half of the autoencoder that this config stands for.

    Args:
        config: a config of diffusers, which may leave out settings.
        way: which half.
        pools: the preview has TAEF2's pooling branches, which diffusers' ``AutoencoderTiny`` lacks (`previews`).

    Returns:
        None where something in the config is not known here.
    """
    whole = complete(config)
    if whole is None:
        return None
    if "z_dim" in whole:
        frame = causal_network(whole, way)
        return Outline(whole, causal_shapes(frame, whole), frame)
    if config["_class_name"] == "AutoencoderTiny":
        return Outline(whole, _tiny_decoder(whole, pools) if way == DECODE else _tiny_encoder(whole, pools), None)
    network = _decoder(whole) if way == DECODE else _encoder(whole)
    shapes = dict(_shapes(network))
    if config["_class_name"] == "AutoencoderKLFlux2":
        features = 4 * whole["latent_channels"]
        shapes |= {"bn.running_mean": (features,), "bn.running_var": (features,), "bn.num_batches_tracked": ()}
    return Outline(whole, shapes, network)


# -- AutoencoderKL and AutoencoderKLFlux2 --------------------------------------------------------------------------


def _decoder(config: dict[str, Any]) -> Network:
    widths = list(reversed(config.get("decoder_block_out_channels") or config["block_out_channels"]))
    groups, latent = config["norm_num_groups"], config["latent_channels"]
    first, last = widths[0], widths[-1]
    layers: list[Layer] = list(_middle("decoder.mid_block", first, config))
    for level, (before, width) in enumerate(pairwise([first, *widths])):
        name = f"decoder.up_blocks.{level}"
        for index in range(config["layers_per_block"] + 1):
            layers.append(_resnet(f"{name}.resnets.{index}", width if index else before, width, groups))
        if level < len(widths) - 1:
            layers.append(Upsample(f"{name}.upsamplers.0", _conv(f"{name}.upsamplers.0.conv", width, width)))
    conv_in, conv_out = _conv("decoder.conv_in", latent, first), _conv("decoder.conv_out", last, config["out_channels"])
    pointwise = _conv("post_quant_conv", latent, latent, 1) if config["use_post_quant_conv"] else None
    return Network(
        DECODE,
        ConvIn(conv_in.name, pointwise, conv_in),
        tuple(layers),
        ConvOut(conv_out.name, _norm("decoder.conv_norm_out", last, groups), conv_out),
    )


def _encoder(config: dict[str, Any]) -> Network:
    widths = list(config["block_out_channels"])
    groups, moments = config["norm_num_groups"], 2 * config["latent_channels"]
    first, last = widths[0], widths[-1]
    layers: list[Layer] = []
    for level, (before, width) in enumerate(pairwise([first, *widths])):
        name = f"encoder.down_blocks.{level}"
        for index in range(config["layers_per_block"]):
            layers.append(_resnet(f"{name}.resnets.{index}", width if index else before, width, groups))
        if level < len(widths) - 1:
            layers.append(Downsample(f"{name}.downsamplers.0", _conv(f"{name}.downsamplers.0.conv", width, width)))
    layers += _middle("encoder.mid_block", last, config)
    conv_in, conv_out = _conv("encoder.conv_in", config["in_channels"], first), _conv("encoder.conv_out", last, moments)
    pointwise = _conv("quant_conv", moments, moments, 1) if config["use_quant_conv"] else None
    end = ConvOut(conv_out.name, _norm("encoder.conv_norm_out", last, groups), conv_out, pointwise)
    return Network(ENCODE, ConvIn(conv_in.name, None, conv_in), *precise(layers, end))


def _middle(name: str, width: int, config: dict[str, Any]) -> Iterator[Layer]:
    groups = config["norm_num_groups"]
    yield _resnet(f"{name}.resnets.0", width, width, groups)
    if config["mid_block_add_attention"]:
        yield _attention(f"{name}.attentions.0", width, groups)
    yield _resnet(f"{name}.resnets.1", width, width, groups)


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


def _tiny_decoder(config: dict[str, Any], pools: bool) -> dict[str, tuple[int, ...]]:
    width, blocks = config["decoder_block_out_channels"][0], config["num_decoder_blocks"]
    found = _conv_shapes("decoder.layers.0", config["latent_channels"], width)
    index = 2  # layer 1 is an activation, which has no tensors
    for level, count in enumerate(blocks):
        for _ in range(count):
            found |= _tiny_block(f"decoder.layers.{index}", width, pools and level == 0)
            index += 1
        last = level == len(blocks) - 1
        index += not last  # the upsampling before the convolution is a layer too, without tensors
        found |= _conv_shapes(f"decoder.layers.{index}", width, config["out_channels"] if last else width, bias=last)
        index += 1
    return found


def _tiny_encoder(config: dict[str, Any], pools: bool) -> dict[str, tuple[int, ...]]:
    widths, blocks = config["encoder_block_out_channels"], config["num_encoder_blocks"]
    found: dict[str, tuple[int, ...]] = {}
    index = 0
    for level, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        before = width if level else config["in_channels"]
        found |= _conv_shapes(f"encoder.layers.{index}", before, width, bias=level == 0)
        for block in range(index + 1, index + 1 + count):
            found |= _tiny_block(f"encoder.layers.{block}", width, pools and level == len(blocks) - 1)
        index += 1 + count
    return found | _conv_shapes(f"encoder.layers.{index}", widths[-1], config["latent_channels"])


def _tiny_block(name: str, width: int, pool: bool) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for part in (0, 2, 4):
        found |= _conv_shapes(f"{name}.conv.{part}", width, width)
    if pool:
        found |= _conv_shapes(f"{name}.pool.0", width, 4 * width, 1, bias=False)
        found |= {f"{name}.pool.1.weight": (4 * width,), f"{name}.pool.1.bias": (4 * width,)}
        found |= _conv_shapes(f"{name}.pool.3", 4 * width, width, 1, bias=False)
    return found


def _conv_shapes(
    name: str, before: int, after: int, kernel: int = 3, *, bias: bool = True
) -> dict[str, tuple[int, ...]]:
    weight = {f"{name}.weight": (after, before, kernel, kernel)}
    return weight | ({f"{name}.bias": (after,)} if bias else {})
