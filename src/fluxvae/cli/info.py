"""``fluxvae info`` says what a checkpoint holds."""

from __future__ import annotations

import math
from typing import Annotated, Any, Optional

import typer

from fluxvae.cli.options import AsJson, Family, Revision, Variant, busy, print_facts, print_json


def info(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="What to look at: 'demo' (the one that ships), a VAE or pipeline folder, a file such as "
            "ae.safetensors, or a hub id.",
            metavar="CHECKPOINT",
        ),
    ],
    revision: Revision = None,
    subfolder: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="The folder of the checkpoint that the VAE lies in. A folder called vae is found by itself.",
            metavar="DIR",
        ),
    ] = None,
    variant: Variant = None,
    family: Family = None,
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint holds: its family, its latents and its size.

    Only the headers of its files are read and not the weights, so it answers at once. A checkpoint that is damaged, or
    not a VAE's, is an error that says what is wrong with it.

    Examples:

    \b
      fluxvae info demo
      fluxvae info black-forest-labs/FLUX.1-schnell --json
      fluxvae info sd3_vae.safetensors --family sd3
    """
    with busy(f"reading {checkpoint}"):
        from fluxvae.checkpoints import open_checkpoint
        from fluxvae.checkpoints.families import FAMILIES
        from fluxvae.engine.plan import size_in_words

        found = open_checkpoint(checkpoint, revision=revision, subfolder=subfolder, variant=variant, family=family)
        latents = found.format
    widths, blocks = found.sizes
    parameters = sum(math.prod(shape) for shape in found.decoder_shapes.values())
    facts: dict[str, Any] = {
        "checkpoint": checkpoint,
        "files": [str(path) for path in found.files],
        "variant": found.variant,
        "model": found.model,
        "layout": found.layout,
        "prefix": found.prefix,
        "family": found.family,
        "told_by": found.told_by,
        "assumed": found.assumed or None,
        "approximate": latents.preview,
        "latent_channels": latents.channels,
        "packed_features": latents.packed_features,
        "vae_scale_factor": latents.vae_scale_factor,
        "scaling_factor": None if latents.statistics else latents.scaling_factor,
        "shift_factor": latents.shift_factor,
        "batch_norm_eps": latents.batch_norm.eps if latents.batch_norm else None,
        "block_out_channels": widths,
        "layers_per_block": blocks,
        "decoder_parameters": parameters,
        "decoder_bytes": found.decoder_bytes,
        "dtype": found.stored_dtypes[0] if len(found.stored_dtypes) == 1 else ", ".join(found.stored_dtypes),
        "scaled": found.scaled,
    }
    if as_json:
        print_json(facts)
        return
    from rich.console import Console
    from rich.markup import escape

    f = latents.vae_scale_factor
    shards = (
        f"{len(found.files)} shards, {found.files[0].name} the first" if len(found.files) > 1 else found.files[0].name
    )
    print_facts(
        Console(highlight=False),
        {
            "checkpoint": f"{checkpoint} ({facts['model']})",
            "weights": escape(shards + (f", variant {found.variant}" if found.variant else "")),
            "names": escape(found.layout + (f", behind {found.prefix!r}" if found.prefix else "")),
            **({"approximate": "a preview, not the image the full VAE decodes"} if latents.preview else {}),
            "family": f"{found.family or 'none named'}, by {found.told_by}",
            **({"models": FAMILIES[found.family].models} if found.family else {}),
            **({"assumed": f"[yellow]{escape(found.assumed)}[/yellow]"} if found.assumed else {}),
            "latents": f"{latents.channels} channels, {f} pixels each way for one latent",
            "packed": f"{latents.packed_features} features for {2 * f} x {2 * f} pixels",
            "raw latents": str(latents),
            "decoder": f"{parameters / 1e6:.1f} million parameters, {size_in_words(found.decoder_bytes)} as stored "
            f"({facts['dtype']}{', scaled' if found.scaled else ''})",
            "channels": " ".join(map(str, widths))
            + (f", {blocks + 1} residual blocks on each level" if blocks else ""),
        },
    )
