"""``fluxvae decode`` turns many files of latents into images."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from fluxvae.claims import MAX_PIXELS
from fluxvae.cli.jobs import SOME_FAILED, check_existing, check_ray, run_job
from fluxvae.cli.options import (
    AsJson,
    Checkpoint,
    Device,
    Dtype,
    Family,
    MemoryLimit,
    Ray,
    Revision,
    Threads,
    Variant,
    Workers,
    busy,
    print_json,
)
from fluxvae.engine.way import DECODE

if TYPE_CHECKING:
    from fluxvae.batch import Job

__all__ = ["decode"]


def decode(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders, globs or URLs of latents: safetensors, npy, npz, pt, Parquet, ComfyUI's .latent, or "
            "the caches of trainers.",
            metavar="INPUT",
        ),
    ],
    out: Annotated[
        str, typer.Option("--out", "-o", help="The folder, or URL, that the images are written to.", metavar="DIR")
    ],
    checkpoint: Checkpoint = "demo",
    revision: Revision = None,
    variant: Variant = None,
    family: Family = None,
    image_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="What is written: png, jpeg, webp, npy or safetensors. The default loses nothing and opens "
            "everywhere.",
            metavar="NAME",
        ),
    ] = "png",
    quality: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="How good jpeg and webp should be, from 1 to 100. Left out it is 95, as for the server's pictures.",
            metavar="N",
        ),
    ] = None,
    height: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="The height of all images, instead of what the files say.", min=1, metavar="PIXELS"),
    ] = None,
    width: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="The width of all images, instead of what the files say.", min=1, metavar="PIXELS"),
    ] = None,
    raw: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--raw/--no-raw",
            help="Say that the latents are as the VAE decodes them (--raw), or as a transformer leaves them "
            "(--no-raw). Left out, the files say it, and where they do not it is asked for and never guessed.",
            show_default=False,
        ),
    ] = None,
    feature_order: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="The order of the features of FLUX.2's patches: row_column_channel for Ideogram 4's latents, "
            "channel_row_column for all others. Nothing in a tensor tells which. Left out, the files may say it; where "
            "they do not, it is the latter.",
            metavar="NAME",
        ),
    ] = None,
    max_pixels: Annotated[
        int,
        typer.Option(
            help="The most pixels that one image may have. A file that claims more is refused by its header, before "
            "it is read, so that a damaged file cannot fill the memory. The default is 16384x16384.",
            min=1,
            metavar="N",
        ),
    ] = MAX_PIXELS,
    batch: Annotated[
        int,
        typer.Option(
            help="How many images of one size are decoded together, at most. It changes no image. The default is "
            "small because every image of a batch takes memory, and because a CPU is no faster with a larger one.",
            min=1,
            metavar="N",
        ),
    ] = 4,
    memory_limit: MemoryLimit = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a job: decode only what has no image yet.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace the images that are there. Left out, a folder that holds some is refused."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done and how long it would take.")
    ] = False,
    ray: Ray = None,
    workers: Workers = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Decode files of latents to images. The job can be stopped, resumed and spread over machines.

    The size of each image is read beside its latents (height and width in safetensors metadata, npz or pt keys, Parquet
    columns), or given here. The images keep the names of their files.

    ComfyUI's .latent and the latent caches of sd-scripts, musubi-tuner, ai-toolkit, SimpleTuner and OneTrainer are
    known by what is in them, and may lie in one folder with the others.

    What cannot be decoded does not stop the rest: it is listed in failures.jsonl, and the exit status is 6.
    docs/batch.md has more.

    Examples:

    \b
      fluxvae decode latents/ --out images/ --checkpoint ae.safetensors
      fluxvae decode 'run-*/*.npz' -o images/ --format webp --resume
      fluxvae decode ComfyUI/output/latents -o images/ --checkpoint ae.safetensors
      fluxvae decode set.parquet -o s3://bucket/images --ray
    """
    existing = check_existing(resume, overwrite)
    check_ray(ray, workers, threads)
    with busy("starting"):
        from fluxvae.batch import Job, decode_files, decode_files_on_ray

    job = Job(
        inputs=tuple(inputs),
        out=out,
        checkpoint=checkpoint,
        revision=revision,
        variant=variant,
        family=family,
        device=device,
        dtype=dtype,
        memory_limit=memory_limit,
        format=image_format,
        quality=quality,
        height=height,
        width=width,
        raw=raw,
        feature_order=feature_order,
        max_pixels=max_pixels,
        batch=batch,
        existing=existing,
    )
    if dry_run:
        _dry_run(job, as_json)
        return
    run = partial(decode_files, job)
    if ray is not None:
        run = partial(decode_files_on_ray, job, address=ray, workers=workers, threads=threads)
    run_job(run, DECODE, checkpoint, on_ray=ray is not None, as_json=as_json)


def _dry_run(job: Job, as_json: bool) -> None:
    from fluxvae.batch.estimate import estimate
    from fluxvae.cli.decode_view import print_outlook

    with busy("reading inputs, and decoding one small image to know the rate"):
        found = estimate(job)
    if as_json:
        print_json(found.as_dict())
    else:
        print_outlook(found)
    raise typer.Exit(SOME_FAILED if found.outlook.failures else 0)
