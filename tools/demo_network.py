"""The demo network: FLUX.1's `AutoencoderKL` with fewer channels, initialised so that it learns quickly.

- **It starts as a linear transform.** The second convolution of every resnet and the attention's output start at zero,
  so that the encoder and the decoder start as chains of a few convolutions, called the main path here. As long as they
  stay zero, the chain *is* the network, and it can be trained alone at about a fifth of the cost.
- **Brightness passes the last GroupNorm.** A norm erases the mean and the contrast of its group, and in this
  architecture the main path of either half has a norm at its end. Its channels start in pairs (u + b, -u - b). The
  offset b dominates the variance of a group, so that the norm is nearly a fixed affine map of u whatever the picture
  is; and because SiLU(u) - SiLU(-u) = u, a pair passes through the activation unharmed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from demo_pictures import Crops

SCALING_FACTOR, SHIFT_FACTOR, CHANNELS = 0.3611, 0.1159, 16  # those of FLUX.1's latents
# 64 channels at full size, because with 32 each group of a norm holds one channel, and the norm erases its brightness.
WIDTHS = (64, 64, 96, 128)
OFFSET = 3.0  # the offset b of the channels before the last norm (see the module)


def build() -> AutoencoderKL:
    """Make a network of FLUX.1's topology and the demo's widths, with diffusers' default initialisation."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=32,
        sample_size=1024,
        scaling_factor=SCALING_FACTOR,
        shift_factor=SHIFT_FACTOR,
        force_upcast=True,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=True,
    )


@torch.no_grad()
def start_linear(vae: AutoencoderKL) -> None:
    """Make both halves start as linear transforms that keep information, brightness included."""
    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.orthogonal_(module.weight)
            torch.nn.init.zeros_(module.bias)
        if name.endswith((".conv2", ".to_out.0")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    encoder, decoder = vae.encoder, vae.decoder
    # This resnet has a shortcut convolution because the last two widths differ.
    into_encoder_norm = encoder.down_blocks[-1].resnets[0].conv_shortcut
    for last, norm, out in (
        (into_encoder_norm, encoder.conv_norm_out, encoder.conv_out),
        (decoder.up_blocks[-2].upsamplers[0].conv, decoder.conv_norm_out, decoder.conv_out),
    ):
        sign = torch.tensor([1.0, -1.0]).repeat(last.out_channels // 2)
        last.weight.copy_(last.weight[::2].repeat_interleave(2, 0) * sign[:, None, None, None])
        last.bias.copy_(OFFSET * sign)
        norm.weight.fill_(OFFSET)
        norm.bias.copy_(-OFFSET * sign)
        out.weight.copy_(out.weight[:, ::2].repeat_interleave(2, 1) * sign[:, None, None] / 2)
    # The posterior's variance is not learned, because nothing here samples; a small fixed one keeps `sample()` sane.
    encoder.conv_out.weight[CHANNELS:] = 0
    encoder.conv_out.bias[CHANNELS:] = -12
    # Raw latents are latents / 0.3611 + 0.1159. With this start, latents have about unit variance after FLUX's scaling.
    encoder.conv_out.weight[:CHANNELS] /= SCALING_FACTOR
    encoder.conv_out.bias[:CHANNELS] = SHIFT_FACTOR
    decoder.conv_in.weight *= SCALING_FACTOR


def chain(blocks: torch.nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    """Compute what blocks compute while their residual branches are zero: they change the channels and the size."""
    for block in blocks:
        for resnet in block.resnets:
            x = x if resnet.conv_shortcut is None else resnet.conv_shortcut(x)
        for resample in getattr(block, "downsamplers", getattr(block, "upsamplers", None)) or ():
            x = resample(x)
    return x


def autoencode(vae: AutoencoderKL, pixels: torch.Tensor, linear: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the raw latents and the reconstruction of pictures; with `linear` through the main path alone."""
    encoder, decoder = vae.encoder, vae.decoder
    if not linear:
        raw = encoder(pixels)[:, :CHANNELS]
        return raw, decoder(raw)
    x = chain(encoder.down_blocks, encoder.conv_in(pixels))
    raw = encoder.conv_out(F.silu(encoder.conv_norm_out(x)))[:, :CHANNELS]
    x = chain(decoder.up_blocks, decoder.conv_in(raw))
    return raw, decoder.conv_out(F.silu(decoder.conv_norm_out(x)))


@torch.no_grad()
def standardise(vae: AutoencoderKL, crops: Crops, linear: bool, centre: bool) -> None:
    """Give every channel of the scaled latents unit deviation over the training pictures, and with `centre` zero mean.

    The encoder's last layer is divided by what the decoder's first layer is multiplied by, so that the pictures stay
    the same. That is exact for the scale. Moving the mean changes pictures at their border, where the decoder pads with
    zeros, so it is only done while there is training left to mend that.
    """
    samples = torch.cat([autoencode(vae, crops.batch(2**40 + i, 4, 128), linear)[0] for i in range(8)])
    latents = (samples - SHIFT_FACTOR) * SCALING_FACTOR
    deviation, mean = latents.std((0, 2, 3)), latents.mean((0, 2, 3)) * centre
    out, into = vae.encoder.conv_out, vae.decoder.conv_in
    moved = SHIFT_FACTOR * (1 - deviation) + mean / SCALING_FACTOR  # raw = raw' * deviation + moved
    out.weight[:CHANNELS] /= deviation[:, None, None, None]
    out.bias[:CHANNELS] = (out.bias[:CHANNELS] - moved) / deviation
    into.bias += into.weight.sum((2, 3)) @ moved
    into.weight *= deviation[:, None, None]
