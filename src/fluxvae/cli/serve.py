"""``fluxvae serve``: Triton and the gateway, supervised."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from fluxvae.cli.options import Device, Family, Variant


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
    variant: Variant = None,
    family: Family = None,
    host: Annotated[str, typer.Option(help="Address of the gateway; 0.0.0.0 opens it to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of the gateway. Any port may be 0: a free one.", min=0, max=65535)] = 8080,
    triton_host: Annotated[str, typer.Option(help="Address of Triton's own endpoints (no token).")] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option(help="Of Triton's gRPC.", min=0, max=65535)] = 8001,
    http_port: Annotated[int, typer.Option(help="Of Triton's HTTP.", min=0, max=65535)] = 8000,
    metrics_port: Annotated[int, typer.Option(help="Of Triton's metrics.", min=0, max=65535)] = 8002,
    allow_client_shm: Annotated[
        bool,
        typer.Option("--allow-client-shm", help="Let clients on this machine pass tensors in shared memory."),
    ] = False,
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
            help="What decodes of all models may add above the weights, such as 4GiB; they share it equally.",
        ),
    ] = None,
    model_memory_limit: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="This model's own part of the memory limit. Repeatable; others share the rest.", metavar="NAME=SIZE"
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
    max_queue: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Requests that may wait in the gateway until one is done (512).", min=0),
    ] = None,
    allowed_host: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="A name that requests may call the gateway by, besides loopback's. Repeatable."),
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
      fluxvae serve --model vae_decoder_flux2=flux2/ --model vae_preview=taef1/
      fluxvae serve ... --memory-limit 4GiB --model-memory-limit vae_preview=500MB
      fluxvae serve --host 0.0.0.0 --token-file token.txt
    """
    from fluxvae.serve.models import read_memory_limits, read_models
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
        allow_client_shm=allow_client_shm,
        models=read_models(model or [], checkpoint),
        revision=revision,
        variant=variant,
        family=family,
        device=device,
        dtype=dtype,
        engine=engine,
        memory_limit=memory_limit,
        model_memory_limits=read_memory_limits(model_memory_limit or []),
        max_pixels=max_pixels,
        threads=threads,
        token=read_token(token_file),
        max_request_bytes=max_request_bytes,
        max_queue=max_queue,
        allowed_hosts=tuple(allowed_host or ()),
        request_timeout_s=request_timeout,
        log_file=None if log_file == "-" else log_file,
        ready_timeout_s=ready_timeout,
        drain_s=drain,
        patience_s=patience,
        busy_limit_s=busy_limit,
    )
    raise typer.Exit(run(settings, follow_logs=log_file == "-"))
