"""Measures bulk decoding: Ray workers, how long the decoder waits for files, and a plain loop of diffusers beside it.

    uv run benchmarks/batch.py                    # all parts; about five minutes on two cores
    uv run benchmarks/batch.py --only overlap loop

It decodes latents of photographs at 512x512 with the demo checkpoint (a little noise makes each image different), and
writes PNGs to a local disk. It has three parts:

- ray: the same job by one Ray worker of one thread, and by two. Workers start and stop some seconds apart, so images
  per second are counted between the moments when a quarter and nine tenths of the files are there, by the files' times.
  The time of the whole job is given too.
- overlap: how much of its time the decoder waits for reading and writing in `fluxvae.batch.decode_files`, and in the
  same steps done one after another.
- loop: `decode_files` against loading, decoding and saving with diffusers and Pillow, image by image.

It checks that the files by Ray and by the steps one after another are those of `decode_files`, byte for byte, and that
diffusers' pictures are within the exact engine's tolerance. Exits 1 where a check fails or a bar is missed. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from fluxvae import Decoder
from fluxvae.batch import Job, decode_files, decode_files_on_ray
from fluxvae.batch.folder import record_of
from fluxvae.batch.outputs import metadata_of, to_bytes
from fluxvae.batch.run import look
from fluxvae.batch.sources import Library
from fluxvae.batch.store import open_store
from fluxvae.batch.worker import checkpoint_sha256
from fluxvae.checkpoints import ASSETS, load_vae
from fluxvae.demo import read_latents
from fluxvae.pictures import postprocess
from fluxvae.verify.oracle import flux_pipeline_tail_raw, level_difference
from fluxvae.verify.tolerances import EXACT_VS_REFERENCE_LEVELS
from measure import machine

SIDE = 512
RAY_IMAGES, IMAGES = 80, 24
RAY_BAR = 1.8
WAIT_BAR = 0.02
PARTS = ("ray", "overlap", "loop")


def make_latents(folder: Path, count: int) -> None:
    """Write ``count`` files of latents of 512x512 pixels: ``0000.safetensors`` and so on."""
    folder.mkdir()
    photographs = [
        read_latents(ASSETS / "latents" / f"{name}_512x512.safetensors")[0] for name in ("astronaut", "chelsea")
    ]
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        latents = photographs[index % 2].float()
        latents = latents + 0.1 * torch.randn(latents.shape, generator=generator)
        save_file({"latents": latents}, folder / f"{index:04d}.safetensors", {"height": str(SIDE), "width": str(SIDE)})


def job_of(folder: Path, out: Path, count: int) -> Job:
    return Job(inputs=tuple(str(path) for path in sorted(folder.iterdir())[:count]), out=str(out), device="cpu")


def warm_decoder() -> Decoder:
    """Make a decoder that has compiled and allocated everything that is compiled or allocated only once."""
    decoder = Decoder.from_pretrained("demo", device="cpu")
    decoder.prepare()
    decoder.decode_raw(torch.zeros(1, 16, SIDE // 8, SIDE // 8))
    return decoder


# -- the jobs that are timed, each in a process of its own ----------------------------------------------------------


def on_ray(folder: Path, out: Path, workers: int) -> dict[str, Any]:
    """Run the job on Ray, with this many workers of one thread each."""
    start = time.perf_counter()
    report = decode_files_on_ray(job_of(folder, out, RAY_IMAGES), workers=workers, threads=1)
    whole = time.perf_counter() - start
    written = sorted(path.stat().st_mtime for path in out.glob("*.png"))
    first, last = len(written) // 4, len(written) * 9 // 10
    rate = (last - first) / (written[last] - written[first])
    return {"decoded": report.decoded, "images_per_second": rate, "seconds": whole}


def overlapped(folder: Path, out: Path) -> dict[str, Any]:
    """Run the job in this process, as `decode_files` does: reading and writing overlap with decoding."""
    report = decode_files(job_of(folder, out, IMAGES), decoder=warm_decoder())
    return {"decoded": report.decoded, "seconds": report.seconds, "wait_share": report.idle_share}


def one_after_another(folder: Path, out: Path) -> dict[str, Any]:
    """Run the steps of the job one after another, each waiting for the one before."""
    decoder, job = warm_decoder(), job_of(folder, out, IMAGES)
    record = record_of(job, checkpoint_sha256(job), decoder)
    store, library = open_store(job.out, "serial"), Library(job.expected(decoder.format))
    items = look(job, decoder, record, store).items
    decoding = 0.0
    start = time.perf_counter()
    for at in range(0, len(items), job.batch):
        group = items[at : at + job.batch]
        latents = torch.cat([library.open(item.source).load(item.row).tensor for item in group])
        decoder.check(latents, height=SIDE, width=SIDE)
        began = time.perf_counter()
        images = postprocess(decoder.decode_raw(latents, height=SIDE, width=SIDE), "uint8")
        decoding += time.perf_counter() - began
        for item, image in zip(group, images, strict=True):
            store.write(f"{item.name}.png", to_bytes(image, "png", None, metadata_of(item, record)))
    seconds = time.perf_counter() - start
    return {"decoded": len(items), "seconds": seconds, "wait_share": 1 - decoding / seconds}


def diffusers_loop(folder: Path, out: Path) -> dict[str, Any]:
    """Run the loop that one would write by hand with diffusers: load, decode, save."""
    vae = load_vae("demo")
    out.mkdir()
    vae.decode(torch.zeros(1, 16, SIDE // 8, SIDE // 8))
    paths = sorted(folder.iterdir())[:IMAGES]
    start = time.perf_counter()
    for path in paths:
        raw = flux_pipeline_tail_raw(vae, load_file(path)["latents"], height=SIDE, width=SIDE)
        postprocess(raw, "pil")[0].save(out / f"{path.stem}.png")
    return {"decoded": len(paths), "seconds": time.perf_counter() - start}


CHILDREN = {
    "ray1": lambda folder, out: on_ray(folder, out, 1),
    "ray2": lambda folder, out: on_ray(folder, out, 2),
    "overlapped": overlapped,
    "one after another": one_after_another,
    "diffusers": diffusers_loop,
}


def run_child(name: str, work: Path) -> dict[str, Any]:
    print(f"{name} ...", file=sys.stderr, flush=True)
    child = [sys.executable, __file__, "--child", name, "--work", str(work)]
    said = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {"what": name, **json.loads(said.splitlines()[-1])}


# -- checks ----------------------------------------------------------------------------------------------------------


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.png")}


def same_files(folder: Path, other: Path, count: int) -> bool:
    """Return whether ``folder`` holds ``count`` images, and ``other`` holds the same bytes under the same names."""
    one, two = digests(folder), digests(other)
    return len(one) == count and all(two.get(name) == digest for name, digest in one.items())


def close_pictures(folder: Path, other: Path) -> tuple[bool, str]:
    """Return whether the pictures of both folders agree within the exact engine's tolerance, and how they differ."""
    pixels = [
        np.stack([np.asarray(Image.open(path)) for path in sorted(where.glob("*.png"))]) for where in (folder, other)
    ]
    levels = level_difference(*pixels)
    return levels.largest <= EXACT_VS_REFERENCE_LEVELS["float32"].bound, str(levels)


def measure_all(only: list[str], work: Path) -> list[dict[str, Any]]:
    """Run the parts and return the rows of the table. ``passed`` in each row says whether its checks held."""
    rows = []
    if "ray" in only:
        one, two = run_child("ray1", work), run_child("ray2", work)
        same = same_files(work / "ray2", work / "ray1", RAY_IMAGES) and one["decoded"] == two["decoded"] == RAY_IMAGES
        two["ratio"] = two["images_per_second"] / one["images_per_second"]
        one |= {"passed": same, "found": ""}
        two |= {
            "passed": same and two["ratio"] >= RAY_BAR,
            "found": f"{two['ratio']:.2f} times one worker (bar {RAY_BAR}), {'the same' if same else 'OTHER'} files",
        }
        rows += [one, two]
    if "overlap" in only or "loop" in only:
        ours = run_child("overlapped", work)
        ours |= {"passed": ours["decoded"] == IMAGES and ours["wait_share"] <= WAIT_BAR}
        ours["found"] = f"the decoder waits {ours['wait_share']:.1%} of its time (bar {WAIT_BAR:.0%})"
        if "ray" in only:
            ours["passed"] &= same_files(work / "overlapped", work / "ray1", IMAGES)
        rows.append(ours)
    if "overlap" in only:
        serial = run_child("one after another", work)
        same = same_files(work / "one after another", work / "overlapped", IMAGES)
        serial |= {
            "passed": same,
            "found": f"it waits {serial['wait_share']:.1%}, {'the same' if same else 'OTHER'} files",
        }
        rows.append(serial)
    if "loop" in only:
        theirs = run_child("diffusers", work)
        close, words = close_pictures(work / "diffusers", work / "overlapped")
        theirs |= {"passed": close, "found": f"{theirs['seconds'] / ours['seconds']:.2f} times ours; {words}"}
        rows.append(theirs)
    for row in rows:
        row.setdefault("images_per_second", row["decoded"] / row["seconds"])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="the parts to run (default: all)")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        torch.set_grad_enabled(False)
        print(json.dumps(CHILDREN[args.child](args.work / "latents", args.work / args.child)))
        return 0
    work = Path(tempfile.mkdtemp(prefix="fluxvae-batch-"))
    try:
        make_latents(work / "latents", RAY_IMAGES)
        rows = measure_all(args.only, work)
    finally:
        shutil.rmtree(work)
    table = Table("job", "images", "seconds", "images/s", "found")
    for row in rows:
        found = row["found"] if row["passed"] else f"[red]FAIL[/red] {row['found']}"
        table.add_row(
            row["what"], str(row["decoded"]), f"{row['seconds']:.1f}", f"{row['images_per_second']:.2f}", found
        )
    Console(width=120).print(table)
    print(json.dumps({"benchmark": "batch", "side": SIDE, **machine(), "rows": rows}))
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
