"""Describes one half of a VAE that is written for video, as its config says: layers as records, and tensors' shapes.

See `outline`, which this is a part of. The structure is that of diffusers 0.42.1: ``autoencoder_kl_qwenimage.py`` and
``autoencoder_kl_wan.py``. For one frame what resamples in time computes nothing, but a checkpoint has its tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from fluxvae.engine.layers import Layer
from fluxvae.engine.layers.attention import Attention
from fluxvae.engine.layers.causal import NORMALIZE_EPS
from fluxvae.engine.layers.conv_in import ConvIn
from fluxvae.engine.layers.conv_out import ConvOut
from fluxvae.engine.layers.downsample import Downsample
from fluxvae.engine.layers.resnet import Resnet
from fluxvae.engine.layers.upsample import Upsample
from fluxvae.engine.network import Network, precise
from fluxvae.engine.records import Conv, PixelNorm, Projections, records_of
from fluxvae.engine.way import DECODE, ENCODE, Way

__all__ = ["causal_network", "causal_shapes"]

_NO_MODULE: Any = None


def causal_network(config: dict[str, Any], way: Way) -> Network:
    """Return the layers of one half, without modules.

    Args:
        config: the complete config of an ``AutoencoderKLQwenImage`` or an ``AutoencoderKLWan`` (2.1's form).
    """
    return _decoder(config) if way == DECODE else _encoder(config)


def causal_shapes(network: Network, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of that half's tensors by their names in diffusers' ``state_dict``."""
    found: dict[str, tuple[int, ...]] = {}
    for record in records_of(network):
        if isinstance(record, Conv):
            found[f"{record.name}.weight"] = record.shape
            found[f"{record.name}.bias"] = record.shape[:1]
        else:  # attention's norm is of a picture, and all others are of a video
            ones = (1,) * (2 if record.name.endswith(".attentions.0.norm") else 3)
            found[f"{record.name}.gamma"] = (record.channels, *ones)
    for name, channels, out in _times(network, config):
        found[f"{name}.time_conv.weight"], found[f"{name}.time_conv.bias"] = (out, channels, 3, 1, 1), (out,)
    return found


def _times(network: Network, config: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """The name, the channels and the results' channels of each convolution over frames."""
    resamples = [layer for layer in network.middle if isinstance(layer, (Upsample, Downsample))]
    both = list(config["temperal_downsample"])
    for layer, temporal in zip(resamples, both[::-1] if network.way == DECODE else both, strict=True):
        if temporal:
            yield layer.name, layer.conv.cin, layer.conv.cin * (2 if network.way == DECODE else 1)


def _decoder(config: dict[str, Any]) -> Network:
    base, latent = config.get("decoder_base_dim") or config["base_dim"], config["z_dim"]
    widths = [base * multiple for multiple in reversed(config["dim_mult"])]
    first, last = widths[0], widths[-1]
    layers: list[Layer] = list(_middle("decoder.mid_block", first))
    for level, (before, width) in enumerate(pairwise([first, *widths])):
        name = f"decoder.up_blocks.{level}"
        for index in range(config["num_res_blocks"] + 1):
            # An enlargement halves the channels.
            given = width if index else before // 2 if level else before
            layers.append(_resnet(f"{name}.resnets.{index}", given, width))
        if level < len(widths) - 1:
            name = f"{name}.upsamplers.0"
            layers.append(Upsample(name, Conv(f"{name}.resample.1", width, width // 2, 3, _NO_MODULE)))
    channels = config["input_channels" if "input_channels" in config else "out_channels"]
    return Network(
        DECODE,
        ConvIn("decoder.conv_in", _conv("post_quant_conv", latent, latent, 1), _conv("decoder.conv_in", latent, first)),
        tuple(layers),
        ConvOut("decoder.conv_out", _norm("decoder.norm_out", last), _conv("decoder.conv_out", last, channels)),
        clamps=True,
    )


def _encoder(config: dict[str, Any]) -> Network:
    base, moments = config["base_dim"], 2 * config["z_dim"]
    widths = [base * multiple for multiple in config["dim_mult"]]
    last, index = widths[-1], 0
    layers: list[Layer] = []
    for level, (before, width) in enumerate(pairwise([base, *widths])):
        for block in range(config["num_res_blocks"]):
            layers.append(_resnet(f"encoder.down_blocks.{index}", width if block else before, width))
            index += 1
        if level < len(widths) - 1:
            name = f"encoder.down_blocks.{index}"
            layers.append(Downsample(name, Conv(f"{name}.resample.1", width, width, 3, _NO_MODULE)))
            index += 1
    layers += _middle("encoder.mid_block", last)
    channels = config["input_channels" if "input_channels" in config else "in_channels"]
    end = ConvOut(
        "encoder.conv_out", _norm("encoder.norm_out", last), _conv("encoder.conv_out", last, moments),
        _conv("quant_conv", moments, moments, 1),
    )  # fmt: skip
    return Network(
        ENCODE, ConvIn("encoder.conv_in", None, _conv("encoder.conv_in", channels, base)), *precise(layers, end)
    )


def _middle(name: str, width: int) -> Iterator[Layer]:
    yield _resnet(f"{name}.resnets.0", width, width)
    attention = f"{name}.attentions.0"
    q, k, v = (Conv(f"{attention}.to_qkv", width, width, 1, _NO_MODULE, part=(part, 3)) for part in range(3))
    out = Conv(f"{attention}.proj", width, width, 1, _NO_MODULE)
    yield Attention(attention, _norm(f"{attention}.norm", width), Projections(q, k, v, out, width**-0.5, True, 1.0))
    yield _resnet(f"{name}.resnets.1", width, width)


def _resnet(name: str, before: int, width: int) -> Resnet:
    return Resnet(
        name,
        _norm(f"{name}.norm1", before),
        _conv(f"{name}.conv1", before, width),
        _norm(f"{name}.norm2", width),
        _conv(f"{name}.conv2", width, width),
        _conv(f"{name}.conv_shortcut", before, width, 1) if before != width else None,
        1.0,
    )


def _conv(name: str, before: int, width: int, kernel: int = 3) -> Conv:
    return Conv(name, before, width, kernel, _NO_MODULE, taps=kernel)


def _norm(name: str, width: int) -> PixelNorm:
    return PixelNorm(name, width, NORMALIZE_EPS, False, _NO_MODULE)
