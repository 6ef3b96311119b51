"""``fluxvae info``: what a checkpoint is."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from fluxvae.cli.options import AsJson, busy, print_facts, print_json


def info(
    checkpoint: Annotated[
        str, typer.Argument(help="'demo', a VAE or pipeline folder, ae.safetensors, or a hub id.", metavar="CHECKPOINT")
    ],
    revision: Annotated[Optional[str], typer.Option(help="Of a hub id: branch, tag or commit.", metavar="NAME")] = None,  # noqa: UP045
    subfolder: Annotated[Optional[str], typer.Option(help="Where the VAE lies in it.", metavar="DIR")] = None,  # noqa: UP045
    as_json: AsJson = False,
) -> None:
    """What a checkpoint holds: its family, its latents, its size. A damaged or foreign one is an error that says how.

    Examples:

    \b
      fluxvae info demo
      fluxvae info black-forest-labs/FLUX.1-schnell --json
    """
    with busy(f"reading {checkpoint}"):
        from fluxvae.checkpoint import load_vae
        from fluxvae.engine.plan import size_in_words
        from fluxvae.latents import LatentFormat

        vae = load_vae(checkpoint, revision=revision, subfolder=subfolder)
    latents = LatentFormat.from_vae(vae)
    config = vae.config
    widths = config.get("decoder_block_out_channels") or config["block_out_channels"]
    decoder = list(vae.decoder.parameters())
    facts: dict[str, Any] = {
        "checkpoint": checkpoint,
        "model": type(vae).__name__,
        "approximate": latents.preview,
        "latent_channels": latents.channels,
        "packed_features": latents.packed_features,
        "vae_scale_factor": latents.vae_scale_factor,
        "scaling_factor": None if latents.batch_norm else latents.scaling_factor,
        "shift_factor": latents.shift_factor,
        "batch_norm_eps": latents.batch_norm.eps if latents.batch_norm else None,
        "block_out_channels": list(widths),
        "layers_per_block": config.get("layers_per_block"),
        "decoder_parameters": sum(parameter.numel() for parameter in decoder),
        "decoder_bytes": sum(parameter.numel() * parameter.itemsize for parameter in decoder),
        "dtype": str(vae.dtype).removeprefix("torch."),
    }
    if as_json:
        print_json(facts)
        return
    f = latents.vae_scale_factor
    print_facts(
        Console(highlight=False),
        {
            "checkpoint": f"{checkpoint} ({facts['model']})",
            **({"approximate": "a preview, not the image the full VAE decodes"} if latents.preview else {}),
            "latents": f"{latents.channels} channels, {f} pixels each way for one latent",
            "packed": f"{latents.packed_features} features for {2 * f} x {2 * f} pixels",
            "raw latents": str(latents),
            "decoder": f"{facts['decoder_parameters'] / 1e6:.1f} million parameters, "
            f"{size_in_words(facts['decoder_bytes'])} as stored ({facts['dtype']})",
            "channels": " ".join(map(str, facts["block_out_channels"]))
            + (f", {facts['layers_per_block'] + 1} residual blocks on each level" if facts["layers_per_block"] else ""),
        },
    )
