"""Reads the decoder of any diffusers ``AutoencoderKL`` into `records`.

Whatever is not understood exactly is refused by name: an engine that guessed would make a silently wrong image.

Read from diffusers 0.42.1: ``autoencoders/vae.py`` (Decoder), ``unets/unet_2d_blocks.py`` (UNetMidBlock2D,
UpDecoderBlock2D), ``resnet.py`` (ResnetBlock2D), ``upsampling.py`` (Upsample2D), ``attention_processor.py``
(Attention, AttnProcessor2_0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, cast

from fluxvae.engine.module_state import check_modules, is_of, unwrapped
from fluxvae.engine.records import Attention, Conv, Layer, Network, Norm, Resnet, Upsample
from fluxvae.errors import InvalidOptionError

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL

__all__ = ["read_network"]


def read_network(vae: AutoencoderKL) -> Network:
    """Read ``vae``'s decoder as it is now.

    Raises:
        InvalidOptionError: naming the module that is not supported, or what was done to one (`check_modules`).
    """
    decoder = unwrapped(getattr(vae, "decoder", None))
    if decoder is None or not hasattr(decoder, "up_blocks"):
        _refuse("vae", vae, "a diffusers AutoencoderKL with a decoder")
    check_modules(cast("torch.nn.Module", vae))
    try:
        return _read(vae, decoder)
    except (AttributeError, IndexError, TypeError) as error:
        raise InvalidOptionError(
            f"engine: the exact engine cannot read vae.decoder ({type(decoder).__name__}): {error}. "
            "Use engine='diffusers' for this model."
        ) from error


def _read(vae: Any, decoder: Any) -> Network:
    _expect("decoder", decoder, "Decoder")
    layers: list[Layer] = []
    mid = _expect("decoder.mid_block", decoder.mid_block, "UNetMidBlock2D")
    layers.append(_resnet("decoder.mid_block.resnets.0", mid.resnets[0]))
    for i, (attention, resnet) in enumerate(zip(mid.attentions, mid.resnets[1:], strict=False)):
        if attention is not None:
            layers.append(_attention(f"decoder.mid_block.attentions.{i}", attention))
        layers.append(_resnet(f"decoder.mid_block.resnets.{i + 1}", resnet))
    scale = 1
    for i, module in enumerate(decoder.up_blocks):
        name = f"decoder.up_blocks.{i}"
        block = _expect(name, module, "UpDecoderBlock2D")
        layers += [_resnet(f"{name}.resnets.{j}", r) for j, r in enumerate(block.resnets)]
        for j, upsampler in enumerate(block.upsamplers or ()):
            layers.append(_upsample(f"{name}.upsamplers.{j}", upsampler))
            scale *= 2
    if any(
        isinstance(a, Upsample) and not isinstance(b, Resnet) for a, b in zip(layers, [*layers[1:], None], strict=True)
    ):
        _refuse("decoder.up_blocks", decoder.up_blocks, "a resnet after every upsampler")
    _silu("decoder.conv_act", decoder.conv_act)
    post_quant = getattr(vae, "post_quant_conv", None)
    conv_in = _conv("decoder.conv_in", decoder.conv_in, 3)
    conv_out = _conv("decoder.conv_out", decoder.conv_out, 3)
    return Network(
        latent_channels=conv_in.cin,
        out_channels=conv_out.cout,
        scale=scale,
        post_quant=None if post_quant is None else _conv("post_quant_conv", post_quant, 1),
        conv_in=conv_in,
        layers=tuple(layers),
        norm_out=_norm("decoder.conv_norm_out", decoder.conv_norm_out),
        conv_out=conv_out,
    )


def _refuse(name: str, module: object, expected: str) -> NoReturn:
    raise InvalidOptionError(
        f"engine: the exact engine cannot read {name} ({type(module).__name__}); it expected {expected}. "
        "Use engine='diffusers' for this model."
    )


def _expect(name: str, module: Any, *types: str) -> Any:
    module = unwrapped(module)
    if not any(is_of(module, name) for name in types):
        _refuse(name, module, " or ".join(types))
    return module


def _conv(name: str, module: Any, kernel: int) -> Conv:
    module = _expect(name, module, "Conv2d")
    pad = (kernel // 2, kernel // 2)
    settings = (module.kernel_size, module.stride, module.dilation, module.groups, module.padding_mode)
    if settings != ((kernel, kernel), (1, 1), (1, 1), 1, "zeros") or tuple(module.padding) != pad:
        _refuse(name, module, f"{kernel}x{kernel}, stride 1, zero padding {pad[0]}, one group")
    return Conv(name, module.in_channels, module.out_channels, kernel, module)


def _linear(name: str, module: Any) -> Conv:
    module = _expect(name, module, "Linear")
    return Conv(name, module.in_features, module.out_features, 1, module)


def _norm(name: str, module: Any) -> Norm:
    module = _expect(name, module, "GroupNorm")
    return Norm(name, module.num_channels, module.num_groups, module.eps, bool(module.affine), module)


def _silu(name: str, module: Any) -> None:
    _expect(name, module, "SiLU")


def _no_dropout(name: str, module: Any) -> None:
    module = _expect(name, module, "Dropout", "Identity")
    if is_of(module, "Dropout") and module.training and module.p > 0:
        _refuse(name, module, "a model in evaluation mode (call vae.eval())")


def _resnet(name: str, module: Any) -> Resnet:
    module = _expect(name, module, "ResnetBlock2D")
    if module.upsample is not None or module.downsample is not None or module.time_emb_proj is not None:
        _refuse(name, module, "a resnet without resampling and time embedding")
    if module.time_embedding_norm not in ("default", "group"):  # "group" is what the decoder's up blocks say
        _refuse(name, module, "time_embedding_norm='default' or 'group'")
    _silu(f"{name}.nonlinearity", module.nonlinearity)
    _no_dropout(f"{name}.dropout", module.dropout)
    conv1, conv2 = _conv(f"{name}.conv1", module.conv1, 3), _conv(f"{name}.conv2", module.conv2, 3)
    shortcut = module.conv_shortcut
    if conv1.cout != conv2.cout or (shortcut is None and conv1.cin != conv2.cout):
        _refuse(name, module, "conv1 and conv2 of the same width")
    return Resnet(
        name,
        _norm(f"{name}.norm1", module.norm1),
        conv1,
        _norm(f"{name}.norm2", module.norm2),
        conv2,
        None if shortcut is None else _conv(f"{name}.conv_shortcut", shortcut, 1),
        float(module.output_scale_factor),
    )


def _attention(name: str, module: Any) -> Attention:
    module = _expect(name, module, "Attention")
    for part in ("spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj"):
        if getattr(module, part, None) is not None:
            _refuse(f"{name}.{part}", getattr(module, part), "none")
    if module.heads != 1 or module.is_cross_attention or getattr(module, "is_causal", False):
        _refuse(name, module, "self-attention of one head")
    if module.group_norm is None:
        _refuse(f"{name}.group_norm", None, "a GroupNorm")
    _no_dropout(f"{name}.to_out.1", module.to_out[1])
    return Attention(
        name,
        _norm(f"{name}.group_norm", module.group_norm),
        _linear(f"{name}.to_q", module.to_q),
        _linear(f"{name}.to_k", module.to_k),
        _linear(f"{name}.to_v", module.to_v),
        _linear(f"{name}.to_out.0", module.to_out[0]),
        float(module.scale),
        bool(module.residual_connection),
        float(module.rescale_output_factor),
    )


def _upsample(name: str, module: Any) -> Upsample:
    module = _expect(name, module, "Upsample2D")
    if not module.use_conv or module.use_conv_transpose or not module.interpolate or module.norm is not None:
        _refuse(name, module, "nearest enlargement and a 3x3 convolution")
    conv = _conv(f"{name}.conv", module.conv if module.name == "conv" else module.Conv2d_0, 3)
    if conv.cin != conv.cout:
        _refuse(name, module, "as many channels out as in")
    return Upsample(name, conv)
