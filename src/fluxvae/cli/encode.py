"""``fluxvae encode`` turns many pictures into files of latents."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Optional

import typer

from fluxvae.claims import MAX_PICTURE_PIXELS
from fluxvae.cli.jobs import check_existing, check_ray, run_job
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
)
from fluxvae.engine.way import ENCODE
from fluxvae.errors import InvalidOptionError

__all__ = ["encode"]


def encode(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Pictures, folders, globs or URLs of them: PNG, JPEG, WebP, BMP, TIFF, GIF and PPM; tars of pictures, "
            "as WebDataset has them; Parquet with a column of pictures.",
            metavar="PICTURES",
        ),
    ],
    out: Annotated[
        str, typer.Option("--out", "-o", help="The folder, or URL, that the latents are written to.", metavar="DIR")
    ],
    checkpoint: Checkpoint = "demo",
    revision: Revision = None,
    variant: Variant = None,
    family: Family = None,
    latents_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="What is written: safetensors, which fluxvae decode reads; or a trainer's cache: kohya (sd-scripts' "
            "FLUX.1 training), musubi-flux2-dev, musubi-flux2-klein-4b, musubi-flux2-klein-9b or musubi-z-image "
            "(musubi-tuner's).",
            metavar="NAME",
        ),
    ] = "safetensors",
    resize: Annotated[
        bool,
        typer.Option(
            "--resize",
            help="Resize pictures whose sides are no multiples of 16 to the multiples below, as diffusers' pipelines "
            "do. Left out, such pictures are refused.",
        ),
    ] = False,
    crop: Annotated[
        bool, typer.Option("--crop", help="Cut such pictures to the multiples below instead; the middle is kept.")
    ] = False,
    buckets: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Bring every picture to one of the sizes that trainers sort pictures into: sides that are multiples "
            "of N pixels, usually 64, the nearest aspect ratio, resized to cover it, the middle kept.",
            min=1,
            metavar="N",
        ),
    ] = None,
    bucket_area: Annotated[
        int,
        typer.Option(
            help="With --buckets, the most pixels of a size. The default is 1024x1024.", min=1, metavar="PIXELS"
        ),
    ] = 1024 * 1024,
    background: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="The colour that shows through transparent pixels, such as white or #808080. Left out, pictures with "
            "transparent pixels are refused, because latents hold no transparency.",
            metavar="COLOR",
        ),
    ] = None,
    unpacked: Annotated[
        bool,
        typer.Option(
            "--unpacked",
            help="Write latents (1, C, height/8, width/8) instead of the tokens that FLUX's transformers take. Sizes "
            "are then multiples of 8; of 16 for FLUX.2, whose latents come in patches.",
        ),
    ] = False,
    sample: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Draw a sample for every picture, by this number and the picture's name, as image-to-image and some "
            "trainers do. Left out, the mode is written.",
            min=0,
            metavar="SEED",
        ),
    ] = None,
    max_pixels: Annotated[
        int,
        typer.Option(
            help="The most pixels that one picture may have. One that claims more is refused by its header, before it "
            "is read. The default is the most that Pillow opens.",
            min=1,
            max=MAX_PICTURE_PIXELS,
            metavar="N",
        ),
    ] = MAX_PICTURE_PIXELS,
    memory_limit: MemoryLimit = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a job: encode only what has no latents yet.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace the latents that are there. Left out, a folder that holds some is refused."
        ),
    ] = False,
    ray: Ray = None,
    workers: Workers = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Encode pictures to latents, exactly. The job can be stopped, resumed and spread over machines.

    Pictures are turned upright as their EXIF says, and their colour profiles are applied. What would be changed without
    a word is refused: transparency, 16 bits, CMYK, animations, and sizes that are no multiples of 16 unless --resize,
    --crop or --buckets says what becomes of them.

    The latents keep the names of their pictures, with the size, the source and the checkpoint's hash beside them, so
    that fluxvae decode needs nothing else. What cannot be encoded does not stop the rest: it is listed in
    failures.jsonl, and the exit status is 6. docs/encoding.md has more.

    Examples:

    \b
      fluxvae encode photographs/ --out latents/ --checkpoint ae.safetensors --crop
      fluxvae encode 'shards/*.tar' -o latents/ --checkpoint ae.safetensors --buckets 64 --resume
      fluxvae encode train/ -o train/ --checkpoint ae.safetensors --buckets 64 --format kohya
      fluxvae encode set.parquet -o s3://bucket/latents --ray
    """
    chosen = [name for name, given in (("resize", resize), ("crop", crop), ("buckets", buckets)) if given]
    if len(chosen) > 1:
        raise InvalidOptionError(f"--{' and --'.join(chosen)}: got {len(chosen)} of them; give one")
    existing = check_existing(resume, overwrite)
    check_ray(ray, workers, threads)
    with busy("starting"):
        from fluxvae.batch import EncodeJob, encode_files, encode_files_on_ray

    job = EncodeJob(
        inputs=tuple(inputs),
        out=out,
        checkpoint=checkpoint,
        revision=revision,
        variant=variant,
        family=family,
        device=device,
        dtype=dtype,
        memory_limit=memory_limit,
        sizes=chosen[0] if chosen else "refuse",  # type: ignore[arg-type]
        bucket=buckets or 64,
        bucket_area=bucket_area,
        background=background,
        packed=not unpacked,
        seed=sample,
        format=latents_format,
        max_pixels=max_pixels,
        existing=existing,
    )
    run = partial(encode_files, job)
    if ray is not None:
        run = partial(encode_files_on_ray, job, address=ray, workers=workers, threads=threads)
    run_job(run, ENCODE, checkpoint, on_ray=ray is not None, as_json=as_json)
