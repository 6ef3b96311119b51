"""``fluxvae serve`` starts Triton and the gateway, and keeps them running."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from fluxvae.cli.options import Device, Family, Revision, Variant


def serve(
    context: typer.Context,
    checkpoint: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            envvar="FLUXVAE_CHECKPOINT",
            help="What the model vae_decoder decodes with: a VAE or pipeline folder of diffusers, a single file such "
            "as ae.safetensors, or a hub id. Left out, it is 'demo', the small one that ships.",
            metavar="SOURCE",
        ),
    ] = None,
    model: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Serve this model with this checkpoint: vae_decoder or vae_encoder (FLUX.1 and its borrowers), "
            "vae_decoder_flux2, vae_encoder_flux2, vae_decoder_qwen_image, vae_encoder_qwen_image or vae_preview "
            "(approximate). Repeat it for several models; the first that decodes is at the gateway's root and /decode, "
            "the first that encodes at /encode.",
            metavar="NAME=SOURCE",
        ),
    ] = None,
    revision: Revision = None,
    variant: Variant = None,
    family: Family = None,
    host: Annotated[
        str,
        typer.Option(
            help="The address that the gateway listens on. The default is reached from this machine only; 0.0.0.0 "
            "opens it to the network, and should go with a token.",
            metavar="ADDRESS",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(help="The gateway's port. Any port may be 0, which is a free one.", min=0, max=65535, metavar="N"),
    ] = 8080,
    triton_host: Annotated[
        str,
        typer.Option(
            help="The address that Triton's own ports listen on. They ask for no token, so the default is this machine "
            "only.",
            metavar="ADDRESS",
        ),
    ] = "127.0.0.1",
    grpc_port: Annotated[
        int,
        typer.Option(help="The port of Triton's gRPC; 8001 is Triton's own default.", min=0, max=65535, metavar="N"),
    ] = 8001,
    http_port: Annotated[
        int,
        typer.Option(help="The port of Triton's HTTP; 8000 is Triton's own default.", min=0, max=65535, metavar="N"),
    ] = 8000,
    metrics_port: Annotated[
        int,
        typer.Option(help="The port of Triton's metrics; 8002 is Triton's own default.", min=0, max=65535, metavar="N"),
    ] = 8002,
    allow_client_shm: Annotated[
        bool,
        typer.Option(
            "--allow-client-shm",
            help="Let clients on this machine pass tensors in shared memory, which is faster. It is off because such a "
            "client can read and write any shared memory that Triton may.",
        ),
    ] = False,
    device: Device = "auto",
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="The precision of the weights: float32, bfloat16 or float16. Left out, it is bfloat16 on NVIDIA "
            "GPUs from compute capability 8.0 on, and float32 elsewhere.",
            metavar="NAME",
        ),
    ] = None,
    engine: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="What the full VAEs decode with: exact (in bounded memory) or diffusers (the reference). Left out, "
            "it is exact.",
            metavar="NAME",
        ),
    ] = None,
    memory_limit: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            envvar="FLUXVAE_MEMORY_LIMIT",
            help="How much memory the decodes of all models together may add above the weights, such as 4GiB; the "
            "models share it equally. Left out, each decode takes what is free when it begins.",
            metavar="SIZE",
        ),
    ] = None,
    model_memory_limit: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Give this model a part of its own of --memory-limit; the others share the rest. A preview, for "
            "example, needs little. Repeat it for several models.",
            metavar="NAME=SIZE",
        ),
    ] = None,
    max_pixels: Annotated[
        int,
        typer.Option(
            help="The most pixels that one request may ask for, its whole batch counted. The default is one image of "
            "4096x4096.",
            min=1,
            metavar="N",
        ),
    ] = 4096 * 4096,
    threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="How many CPU threads one instance of a model computes with. Left out, it is PyTorch's own choice.",
            min=1,
            metavar="N",
        ),
    ] = None,
    token_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="The file that holds the token which clients of the gateway must send. FLUXVAE_TOKEN in the "
            "environment does the same; there is no option for the token itself, since every user can read command "
            "lines.",
            metavar="FILE",
        ),
    ] = None,
    log_file: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Append the logs of Triton and the gateway to this file; - is standard error, as containers want it. "
            "Left out, they are temporary files that are named at the start.",
            metavar="FILE",
        ),
    ] = None,
    max_request_bytes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="The most bytes that the body of one request to the gateway may have. Left out, it is 16 MiB, the "
            "latents of 4096x4096 in float32.",
            min=1,
            metavar="N",
        ),
    ] = None,
    max_picture_bytes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="The most bytes of a picture, or a tensor of pixels, that the gateway takes to encode. Left out, it "
            "is 192 MiB, the pixels of 4096x4096 in float32.",
            min=1,
            metavar="N",
        ),
    ] = None,
    max_queue: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="How many requests may wait in the gateway's line; beyond them the answer is 503 with a time to try "
            "again. Left out, it is 512.",
            min=0,
            metavar="N",
        ),
    ] = None,
    allowed_host: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Another name that requests may call the gateway by. On loopback without a token it answers to "
            "loopback's names only, so that no web page can pretend to be of its origin. Repeat it for several.",
            metavar="NAME",
        ),
    ] = None,
    request_timeout: Annotated[
        float,
        typer.Option(
            help="How many seconds a request may take until its answer, waiting included. Raise it for very large "
            "images on a CPU.",
            metavar="SECONDS",
        ),
    ] = 300.0,
    ready_timeout: Annotated[
        float,
        typer.Option(
            help="How many seconds loading the checkpoint and a first decode may take before the start counts as "
            "failed.",
            metavar="SECONDS",
        ),
    ] = 300.0,
    drain: Annotated[
        float,
        typer.Option(
            help="How many seconds requests under way get to finish when the server is stopped.", metavar="SECONDS"
        ),
    ] = 30.0,
    patience: Annotated[
        float,
        typer.Option(
            help="How many seconds Triton may neither answer nor compute before it is taken for hung and restarted. "
            "Raise it where decodes spill to a very slow disk.",
            metavar="SECONDS",
        ),
    ] = 30.0,
    busy_limit: Annotated[
        float,
        typer.Option(
            help="How many seconds Triton may compute without an answer before it is taken for hung. Raise it for "
            "single decodes that take longer than the default of an hour.",
            metavar="SECONDS",
        ),
    ] = 3600.0,
) -> None:
    """Serve a VAE to other programs and machines, and keep it running.

    It starts Triton Inference Server, and in front of it an HTTP gateway that speaks diffusers' remote_decode and
    remote_encode, and has a page at http://127.0.0.1:8080/. It watches both by tiny requests, and restarts what dies or
    hangs. Ctrl-C or SIGTERM stops it after the requests under way; a second one stops it at once. docs/serving.md has
    more.

    Examples:

    \b
      fluxvae serve
      fluxvae serve --checkpoint ae.safetensors --memory-limit 4GiB
      fluxvae serve --checkpoint ae.safetensors --model vae_encoder=ae.safetensors
      fluxvae serve --model vae_decoder_flux2=flux2/ --model vae_preview=taef1/
      fluxvae serve ... --memory-limit 4GiB --model-memory-limit vae_preview=500MB
      fluxvae serve --host 0.0.0.0 --token-file token.txt
    """
    from fluxvae.serve.triton.installation import check_system

    check_system()  # before anything is imported that other systems do not have
    from fluxvae.serve.models import read_memory_limits, read_models
    from fluxvae.serve.supervisor.command import read_token, run
    from fluxvae.serve.supervisor.settings import ServeSettings

    source = context.get_parameter_source("checkpoint")
    if model and source is not None and source.name == "ENVIRONMENT":
        checkpoint = None  # options win over the environment, and --model says all that is served
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
        max_picture_bytes=max_picture_bytes,
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
