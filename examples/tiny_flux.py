"""Write a stand-in for FLUX to a folder: diffusers' whole FluxPipeline, with tiny random models and the demo's VAE.

    uv run examples/tiny_flux.py tiny-flux

`FluxPipeline.from_pretrained("tiny-flux")` and `FluxImg2ImgPipeline.from_pretrained("tiny-flux")` open it, and take a
prompt. It is for trying the walkthroughs (docs/walkthroughs) without FLUX's weights: everything runs as with FLUX, but
it cannot paint. Its transformer moves latents only a little, so that a photograph which it begins with stays one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from fluxvae.checkpoints import ASSETS

WIDTH = 32
"""The features of the text encoders, which for FLUX are 768 and 4096."""
CALM = 0.1
"""The factor of the transformer's last weights: with the usual random ones, noise would hide the photograph."""


def tiny_flux() -> FluxPipeline:
    """Return the pipeline. The same seed makes the same weights every time, in float32."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    with torch.no_grad():
        transformer.proj_out.weight *= CALM
        transformer.proj_out.bias *= CALM
    # Every word is the unknown one, so that no vocabulary is needed.
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    clip = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    t5 = T5Config(vocab_size=len(pieces), d_model=WIDTH, d_kv=16, d_ff=WIDTH, num_layers=1, num_heads=2)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL.from_pretrained(ASSETS / "demo"),
        text_encoder=CLIPTextModel(clip),
        tokenizer=CLIPTokenizer(vocab=words, merges=[], model_max_length=77),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=T5TokenizerFast(vocab=pieces, extra_ids=0),
        transformer=transformer,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder that is written")
    folder = parser.parse_args().folder
    if folder.exists():
        sys.exit(f"folder: {folder} is there already; give a new one, or remove it")
    tiny_flux().save_pretrained(folder)
    print(f"{folder}: a FluxPipeline with tiny random models, and the VAE that ships with fluxvae")


if __name__ == "__main__":
    main()
