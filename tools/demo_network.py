"""The demo network: FLUX.1's `AutoencoderKL`, narrow, and started so that it learns quickly.

- **It starts as a linear transform.** The second convolution of every resnet and the attention's output start at zero,
  so encoder and decoder start as chains of a few convolutions: the main path. While that is so the chain *is* the
  network, and can be trained alone at about a fifth of the cost.
- **Brightness passes the last GroupNorm.** A norm erases its group's mean and contrast, and in this architecture one
  sits on the main path of either half. Channels start there in pairs (u + b, -u - b): the offset dominates the
  group's variance, so the norm is nearly a fixed affine map of u whatever the picture, and SiLU(u) - SiLU(-u) = u makes
  the pair pass through the activation unharmed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from demo_pictures import Crops

SCALING_FACTOR, SHIFT_FACTOR, CHANNELS = 0.3611, 0.1159, 16  # FLUX.1's
WIDTHS = (64, 64, 96, 128)  # 64 at full size: with 32, a norm's groups hold one channel each and erase its brightness
OFFSET = 3.0  # b above


def build() -> AutoencoderKL:
    """FLUX.1's topology at the demo's widths, with diffusers' default initialisation."""
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
    into_encoder_norm = encoder.down_blocks[-1].resnets[0].conv_shortcut  # exists: the last two widths differ
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
    # The posterior's variance is not learned: nothing here samples, and a fixed small one keeps `sample()` sane.
    encoder.conv_out.weight[CHANNELS:] = 0
    encoder.conv_out.bias[CHANNELS:] = -12
    # Raw latents are latents / 0.3611 + 0.1159: start near unit variance after FLUX's scaling.
    encoder.conv_out.weight[:CHANNELS] /= SCALING_FACTOR
    encoder.conv_out.bias[:CHANNELS] = SHIFT_FACTOR
    decoder.conv_in.weight *= SCALING_FACTOR


def chain(blocks: torch.nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    """What blocks do while their residual branches are zero: change the channels, change the size."""
    for block in blocks:
        for resnet in block.resnets:
            x = x if resnet.conv_shortcut is None else resnet.conv_shortcut(x)
        for resample in getattr(block, "downsamplers", getattr(block, "upsamplers", None)) or ():
            x = resample(x)
    return x


def autoencode(vae: AutoencoderKL, pixels: torch.Tensor, linear: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw latents and reconstruction; with `linear`, through the main path alone."""
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
    """Give every scaled latent channel unit deviation over the training pictures, and with `centre` zero mean.

    What the encoder's last layer is divided by, the decoder's first is multiplied by. The scale is exact; the mean is
    not at the border, where the decoder pads with zeros, so it is only moved while there is training left.
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
