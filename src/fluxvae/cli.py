"""The command line: ``fluxvae serve``, ``fluxvae plan``, ``fluxvae info``.

What needs PyTorch is imported by the commands that need it, so that ``fluxvae --help`` answers at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table

from fluxvae import __version__
from fluxvae.errors import FluxVAEError, status_of

__all__ = ["app", "main"]

_EXAMPLES = """

Examples:

\b
  fluxvae serve                               the demo checkpoint, here
  fluxvae serve --checkpoint ae.safetensors   FLUX.1's own weights
  fluxvae plan 2048 2048 --memory-limit 2GiB  what memory goes to
  fluxvae info ae.safetensors                 what a checkpoint holds

Environment: FLUXVAE_CHECKPOINT, FLUXVAE_DEVICE, FLUXVAE_MEMORY_LIMIT, FLUXVAE_TOKEN. Options win over it.
"""

app = typer.Typer(
    name="fluxvae",
    help="Packed FLUX latents in, exactly the image that diffusers' FluxPipeline would have made out." + _EXAMPLES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

# Shared options. Optional[...]: typer reads the annotations at run time, also under Python 3.10.
Checkpoint = Annotated[
    str,
    typer.Option(
        envvar="FLUXVAE_CHECKPOINT",
        help="'demo', a VAE or pipeline folder, ae.safetensors, or a hub id.",
        metavar="SOURCE",
    ),
]
Device = Annotated[str, typer.Option(envvar="FLUXVAE_DEVICE", help="auto, cpu, cuda or cuda:N.")]
MemoryLimit = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(envvar="FLUXVAE_MEMORY_LIMIT", help="What a decode may add above the weights, such as 2GiB."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fluxvae {__version__}")
        raise typer.Exit


@app.callback()
def _fluxvae(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="And exit.")] = False,
) -> None:
    pass


@app.command()
def plan(
    height: Annotated[int, typer.Argument(help="Of the image, in pixels: a multiple of 8.", min=1)],
    width: Annotated[int, typer.Argument(help="Of the image, in pixels: a multiple of 8.", min=1)],
    checkpoint: Checkpoint = "demo",
    batch: Annotated[int, typer.Option(help="Images in one decode.", min=1)] = 1,
    memory_limit: MemoryLimit = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    kernels: Annotated[str, typer.Option(help="auto is the fastest for the device.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """How an image of this size would be decoded: memory, and what is computed twice or spilled.

    Examples:

    \b
      fluxvae plan 1024 1024
      fluxvae plan 4096 4096 --memory-limit 2GiB --checkpoint ae.safetensors
    """
    from fluxvae import Decoder
    from fluxvae.engine.plan import size_in_words

    with _busy(f"reading {checkpoint}"):
        decoder = Decoder.from_pretrained(
            checkpoint, device=device, dtype=dtype, kernels=kernels, memory_limit=memory_limit
        )
    found = decoder.plan(height, width, batch)
    smallest = decoder.engine.smallest_limit(height // 8, width // 8, batch)  # type: ignore[union-attr]
    facts: dict[str, Any] = {
        "height": found.height,
        "width": found.width,
        "batch": found.batch,
        "checkpoint": checkpoint,
        "device": str(decoder.device),
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "kernels": found.kernels,
        "approximate": decoder.approximate,
        "limit_bytes": found.limit,
        "peak_bytes": found.peak_bytes,
        "smallest_limit_bytes": smallest,
        "spill_bytes": found.spill_bytes,
        "work_ratio": found.work_ratio,
        "multiply_adds": found.macs * found.batch,
    }
    if as_json:
        _print_json(facts)
        return
    limit = "none" if found.limit is None else f"{size_in_words(found.limit)} ({found.limit_source})"
    spill = f", {size_in_words(found.spill_bytes)} spilled to {found.spill_dir}" if found.spill_bytes else ""
    console = Console(highlight=False)
    _facts(
        console,
        {
            "image": f"{found.height} x {found.width} (height x width){f', {batch} of them' if batch > 1 else ''}",
            "checkpoint": f"{checkpoint}, {facts['dtype']} on {decoder.device}, kernels {found.kernels}",
            "peak memory": f"{size_in_words(found.peak_bytes)} above the weights{spill}",
            "limit": f"{limit}; the smallest that works: {size_in_words(smallest)}",
            "work": f"{found.macs * batch / 1e12:.2f} trillion multiply-adds, {found.work_ratio:.2f} times the least",
            **({"note": found.kernels_note} if found.kernels_note else {}),
        },
    )
    table = Table("layer", "map", "middle", "result", "peak", box=None, header_style="bold", pad_edge=False)
    table.columns[1].justify = table.columns[4].justify = "right"
    for layer in found.layers:
        peak = found.fixed_bytes + max((step.held for step in layer.steps), default=0)
        shape = f"{layer.height}x{layer.width}x{layer.channels}"
        name = layer.name.removeprefix("decoder.")
        table.add_row(name, shape, layer.middle or "", layer.out, size_in_words(peak))
    console.print()
    console.print(table)


@app.command()
def info(
    checkpoint: Annotated[str, typer.Argument(help="'demo', a VAE or pipeline folder, ae.safetensors, or a hub id.")],
    revision: Annotated[Optional[str], typer.Option(help="Of a hub id.")] = None,  # noqa: UP045
    subfolder: Annotated[Optional[str], typer.Option(help="Where the VAE lies in it.")] = None,  # noqa: UP045
    as_json: AsJson = False,
) -> None:
    """What a checkpoint holds: its family, its latents, its size. Also whether it is whole.

    Examples:

    \b
      fluxvae info demo
      fluxvae info black-forest-labs/FLUX.1-schnell --json
    """
    with _busy(f"reading {checkpoint}"):
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
        _print_json(facts)
        return
    f = latents.vae_scale_factor
    _facts(
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


@app.command()
def serve(
    context: typer.Context,
    checkpoint: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            envvar="FLUXVAE_CHECKPOINT",
            help="Of the model vae_decoder: 'demo' (the default), a VAE or pipeline folder, ae.safetensors, a hub id.",
            metavar="SOURCE",
        ),
    ] = None,
    model: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Serve this model: vae_decoder (FLUX.1), vae_decoder_flux2 or vae_preview (approximate). Repeatable.",
            metavar="NAME=SOURCE",
        ),
    ] = None,
    revision: Annotated[Optional[str], typer.Option(help="Of a hub id.")] = None,  # noqa: UP045
    host: Annotated[str, typer.Option(help="Address of the gateway; 0.0.0.0 opens it to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of the gateway. Any port may be 0: a free one.", min=0, max=65535)] = 8080,
    triton_host: Annotated[str, typer.Option(help="Address of Triton's own endpoints (no token).")] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option(help="Of Triton's gRPC.", min=0, max=65535)] = 8001,
    http_port: Annotated[int, typer.Option(help="Of Triton's HTTP.", min=0, max=65535)] = 8000,
    metrics_port: Annotated[int, typer.Option(help="Of Triton's metrics.", min=0, max=65535)] = 8002,
    device: Device = "auto",
    dtype: Annotated[Optional[str], typer.Option(help="float32, bfloat16 or float16.")] = None,  # noqa: UP045
    engine: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="exact or diffusers, of the full VAEs."),
    ] = None,
    memory_limit: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            envvar="FLUXVAE_MEMORY_LIMIT",
            help="What decodes may add above the weights, such as 4GiB; several models share it equally.",
        ),
    ] = None,
    max_pixels: Annotated[int, typer.Option(help="Of one request, its batch counted.", min=1)] = 4096 * 4096,
    threads: Annotated[Optional[int], typer.Option(help="CPU threads of one instance.", min=1)] = None,  # noqa: UP045
    token_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Holds the token that clients of the gateway must send; or set FLUXVAE_TOKEN."),
    ] = None,
    log_file: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Append the logs of Triton and the gateway to this file; - is standard error."),
    ] = None,
    max_request_bytes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Of one request to the gateway.", min=1),
    ] = None,
    request_timeout: Annotated[float, typer.Option(help="Seconds from a request to its answer.")] = 300.0,
    ready_timeout: Annotated[float, typer.Option(help="Seconds to load and decode a first time.")] = 300.0,
    drain: Annotated[float, typer.Option(help="Seconds for requests under way when it is stopped.")] = 30.0,
    patience: Annotated[float, typer.Option(help="Seconds without an answer and without work: Triton is hung.")] = 30.0,
    busy_limit: Annotated[float, typer.Option(help="Seconds without an answer, despite work: it is hung.")] = 3600.0,
) -> None:
    """Serve the decoder: Triton Inference Server and the HTTP gateway, watched and restarted.

    Stops on Ctrl-C or SIGTERM after the requests under way; a second one stops at once. docs/serving.md has more.

    Examples:

    \b
      fluxvae serve
      fluxvae serve --checkpoint ae.safetensors --memory-limit 4GiB
      fluxvae serve --model vae_decoder_flux2=flux2/ --model vae_preview=taef2/
      fluxvae serve --host 0.0.0.0 --token-file token.txt
    """
    from fluxvae.serve.models import read_models
    from fluxvae.serve.supervisor.command import read_token, run
    from fluxvae.serve.supervisor.settings import ServeSettings

    source = context.get_parameter_source("checkpoint")
    if model and source is not None and source.name == "ENVIRONMENT":
        checkpoint = None  # options win over the environment: --model says all that is served
    settings = ServeSettings(
        host=host,
        port=port,
        triton_host=triton_host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        models=read_models(model or [], checkpoint),
        revision=revision,
        device=device,
        dtype=dtype,
        engine=engine,
        memory_limit=memory_limit,
        max_pixels=max_pixels,
        threads=threads,
        token=read_token(token_file),
        max_request_bytes=max_request_bytes,
        request_timeout_s=request_timeout,
        log_file=None if log_file == "-" else log_file,
        ready_timeout_s=ready_timeout,
        drain_s=drain,
        patience_s=patience,
        busy_limit_s=busy_limit,
    )
    raise typer.Exit(run(settings, follow_logs=log_file == "-"))


def main() -> None:
    """The ``fluxvae`` command. Errors are one message and an exit status of the error table."""
    try:
        app()
    except FluxVAEError as error:
        _errors().print(f"[bold red]{type(error).__name__}[/bold red]: ", end="", highlight=False)
        _errors().print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(status_of(error).exit_code)


def _errors() -> Console:
    return Console(stderr=True)


def _busy(what: str) -> Any:
    """A sign of life on a terminal; nothing in a pipe."""
    return _errors().status(f"{what} ...")


def _facts(console: Console, facts: dict[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(f"[bold]{name}[/bold]", value)
    console.print(table)


def _print_json(facts: dict[str, Any]) -> None:
    typer.echo(json.dumps(facts))


if __name__ == "__main__":
    main()
