"""Files that claim more than they may: refused by their headers, in little memory, and the others are decoded."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fluxvae import Decoder

from .jobs import CPU, failures, folder_of, image, latents, pixels

_MEASURED = """
import sys
from pathlib import Path
from fluxvae import cli

sys.argv = sys.argv[1:]
try:
    cli.main()
except SystemExit as end:
    status = end.code
# Not ru_maxrss, which a new program takes over from the process that started it: this one, which wrote the files.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
print(int(peak.split()[1]) // 1024, file=sys.stderr)
sys.exit(status)
"""


def zeros(*shape: int) -> torch.Tensor:
    """A tensor of any size in the memory of one value."""
    return torch.zeros(1, dtype=torch.float32, device="cpu").expand(*shape)


class Bytes:
    """A pickle that PyTorch allows, and that takes as many bytes as it says."""

    def __reduce__(self) -> Any:
        return bytearray, (4 * 10**9,)


def zipped_zeros(path: Path, name: str, header: bytes, size: int) -> None:
    """A zip archive with one file of so many zeros behind a header, written without that much memory."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(name, "w", force_zip64=True) as file,
    ):
        file.write(header)
        block = bytes(2**20)
        for _ in range(size // len(block)):
            file.write(block)


def npy_header(shape: tuple[int, ...]) -> bytes:
    """Of float32."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


def bombs(there: Path) -> dict[str, str]:
    """Write them; what is said of each."""
    size = 512 * 2**20
    zipped_zeros(there / "zeros.npz", "latents.npy", npy_header((1, 16, 2048, 4096)), size)
    zipped_zeros(there / "rows.npz", "latents.npy", npy_header((2048, 16, 64, 64)), size)
    zipped_zeros(there / "pickle.pt", "pickle/data.pkl", b"", size)
    torch.save({"latents": zeros(1, 16, 50_000, 50_000)}, there / "expanded.pt")
    torch.save({"latents": zeros(10**6, 16, 512, 512)}, there / "many.pt")
    torch.save({"latents": latents(1), "height": Bytes(), "width": 64}, there / "bytes.pt")
    torch.save({"latents": latents(1), "latent_ids": zeros(10**9, 4)}, there / "ids.pt")
    legacy = io.BytesIO()
    torch.save(zeros(1, 16, 50_000, 50_000), legacy, _use_new_zipfile_serialization=False)
    (there / "legacy.pt").write_bytes(legacy.getvalue())
    with gzip.open(there / "gzip.pt", "wb", compresslevel=1) as packed:
        for _ in range(128):
            packed.write(bytes(2**22))
    with open(there / "sparse.npy", "wb") as sparse:
        sparse.write(npy_header((1, 16, 16384, 16384)))
        sparse.truncate(sparse.tell() + 16 * 16384 * 16384 * 4)
    np.save(there / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    side, rows = 1024 * 1024, 300
    values = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([bytes(4 * 2**20)]))
    shapes = [[16, 8, 8]] * rows
    pq.write_table(pa.table({"latents": values, "shape": shapes}), there / "shared.parquet", compression="zstd")
    lists = pa.ListArray.from_arrays(pa.array(range(0, 65 * side, side), pa.int32()), pa.nulls(64 * side, pa.float32()))
    lists = pa.ListArray.from_arrays(lists.offsets, lists.values.fill_null(0.0))
    table = pa.table({"latents": lists, "height": [2048] * 64, "width": [2048] * 64})
    pq.write_table(table, there / "lists.parquet", compression="zstd", row_group_size=64)
    with open(there / "header.npy", "wb") as sparse:  # version 2.0, with a header of 3 GiB
        sparse.write(b"\x93NUMPY\x02\x00" + (3 * 2**30).to_bytes(4, "little"))
        sparse.truncate(4 * 2**30)
    with open(there / "old.pt", "wb") as sparse:
        sparse.write(legacy.getvalue())
        sparse.truncate(2**40)
    os.mkfifo(there / "pipe.npy")
    os.mkfifo(there / "pipe.parquet")
    (there / "device.npy").symlink_to("/dev/zero")
    names = pa.table({"latents": [[0.0]] * 16, "name": ["a" * (16 * 2**20)] * 16})
    pq.write_table(names, there / "names.parquet", compression="zstd", row_group_size=1, use_dictionary=False)
    return {
        "header.npy": "claims a header of 3221225472 bytes",
        "old.pt": "got 1099511627776 bytes in the format that torch.save had before PyTorch 1.6",
        "pipe.npy": "is a pipe, a device or a folder",
        "pipe.parquet": "is a pipe, a device or a folder",
        "device.npy": "is a pipe, a device or a folder",
        "names.parquet": "all row groups of name: claims",
        "zeros.npz": "claims 536871040 bytes",
        "rows.npz": "claims 536871040 bytes",
        "pickle.pt": "claims 536870912 bytes",
        "expanded.pt": "claims 160000000000 bytes",
        "many.pt": "claims 16777216000000 bytes",
        "bytes.pt": "refused, for it holds a bytearray",
        "ids.pt": "latent_ids: got shape (1000000000, 4) for 1 latents of 16 patches",
        "legacy.pt": "claims 160000000000 bytes",
        "gzip.pt": "unpacks to more than",
        "sparse.npy": "which decode to 17179869184 pixels, more than the 268435456",
        "objects.npy": "got an array of Python objects, expected numbers",
        "shared.parquet": "shape: got [16, 8, 8] for 1048576 values",
        "lists.parquet": "row group 0 of latents.list.element: claims 268435456 bytes",
    }


def test_bombs_are_refused_and_the_rest_is_done(tmp_path: Path, demo: Decoder) -> None:
    """In a process of its own, whose memory stays far below what the files claim."""
    there = tmp_path / "in"
    made = folder_of(there, 2)
    command = [sys.executable, "-c", _MEASURED, "fluxvae", "decode", str(there), "-o"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(out: str) -> tuple[int, int]:
        told = subprocess.run(
            [*command, str(tmp_path / out), *CPU], env=environment, capture_output=True, text=True, check=False
        )
        return told.returncode, int(told.stderr.splitlines()[-1])

    status, before = run("before")
    assert status == 0
    expected = bombs(there)
    status, peak = run("out")
    assert status == 6
    told: dict[str, list[str]] = {}
    for line in failures(tmp_path / "out"):
        told.setdefault(Path(line["source"]).name, []).append(line["message"])
    assert told.keys() == expected.keys(), json.dumps(told, indent=1)
    for name, words in expected.items():
        assert all(words in message for message in told[name]), told[name]
    for name, tensor in made.items():
        assert np.array_equal(image(tmp_path / f"out/{name}.png"), pixels(demo, tensor))
    assert peak < before + 400, f"{peak} MiB with bombs, {before} without"
