"""Files that claim more than they may: refused by their headers, in little memory, and the others are decoded."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import warnings
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
import json, sys
from pathlib import Path
from fluxvae import cli

jobs, options, told = json.loads(sys.argv[1]), sys.argv[2:], []
for there, out in jobs:
    sys.argv = ["fluxvae", "decode", there, "-o", out, *options]
    status = 0
    try:
        cli.main()
    except SystemExit as end:
        status = end.code
    # Not ru_maxrss: a new program inherits it from the process that started it, which is this one, and that has written
    # the files.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    told.append([status, int(peak.split()[1]) // 1024])
print(json.dumps(told), file=sys.stderr)
"""


def zeros(*shape: int) -> torch.Tensor:
    """A tensor of any size in the memory of one value."""
    return torch.zeros(1, dtype=torch.float32, device="cpu").expand(*shape)


class Bytes:
    """An object whose pickle PyTorch allows, and which takes 4 GB when it is unpickled."""

    def __reduce__(self) -> Any:
        return bytearray, (4 * 10**9,)


def zipped_zeros(path: Path, name: str, header: bytes, size: int) -> None:
    """Write a zip archive with one file, a header and ``size`` zeros, without taking as much memory."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(name, "w", force_zip64=True) as file,
    ):
        file.write(header)
        block = bytes(2**20)
        for _ in range(size // len(block)):
            file.write(block)


def npy_header(shape: tuple[int, ...]) -> bytes:
    """The header of an ``.npy`` file that claims a float32 array of this shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


def bombs(there: Path) -> dict[str, str]:
    """Write files that claim far too much, and return what the failure of each says."""
    size = 128 * 2**20
    zipped_zeros(there / "zeros.npz", "latents.npy", npy_header((1, 16, 1024, 2048)), size)
    zipped_zeros(there / "rows.npz", "latents.npy", npy_header((512, 16, 64, 64)), size)
    zipped_zeros(there / "pickle.pt", "pickle/data.pkl", b"", size)
    torch.save({"latents": zeros(1, 16, 50_000, 50_000)}, there / "expanded.pt")
    torch.save({"latents": zeros(10**6, 16, 512, 512)}, there / "many.pt")
    torch.save({"latents": latents(1), "height": Bytes(), "width": 64}, there / "bytes.pt")
    torch.save({"latents": latents(1), "latent_ids": zeros(10**9, 4)}, there / "ids.pt")
    legacy = io.BytesIO()
    torch.save(zeros(1, 16, 50_000, 50_000), legacy, _use_new_zipfile_serialization=False)
    (there / "legacy.pt").write_bytes(legacy.getvalue())
    with gzip.open(there / "gzip.pt", "wb", compresslevel=1) as packed:
        for _ in range(32):
            packed.write(bytes(2**22))
    with open(there / "sparse.npy", "wb") as sparse:
        sparse.write(npy_header((1, 16, 16384, 16384)))
        sparse.truncate(sparse.tell() + 16 * 16384 * 16384 * 4)
    np.save(there / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    side, rows = 1024 * 1024, 300
    values = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([bytes(4 * 2**20)]))
    shapes = [[16, 8, 8]] * rows
    pq.write_table(pa.table({"latents": values, "shape": shapes}), there / "shared.parquet", compression="zstd")
    lists = pa.ListArray.from_arrays(pa.array(range(0, 25 * side, side), pa.int32()), pa.nulls(24 * side, pa.float32()))
    lists = pa.ListArray.from_arrays(lists.offsets, lists.values.fill_null(0.0))
    table = pa.table({"latents": lists, "height": [2048] * 24, "width": [2048] * 24})
    pq.write_table(table, there / "lists.parquet", compression="zstd", row_group_size=24)
    with open(there / "header.npy", "wb") as sparse:  # NumPy's format 2.0, with a header of 3 GiB
        sparse.write(b"\x93NUMPY\x02\x00" + (3 * 2**30).to_bytes(4, "little"))
        sparse.truncate(4 * 2**30)
    with open(there / "old.pt", "wb") as sparse:
        sparse.write(legacy.getvalue())
        sparse.truncate(2**40)
    with zipfile.ZipFile(there / "directory.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("latents.npy", npy_header((1, 16, 1024, 2048)) + bytes(2**22))
    small = bytearray((there / "directory.npz").read_bytes())
    struct.pack_into("<I", small, small.rfind(b"PK\x01\x02") + 24, 4096)  # its directory gives a wrong size
    (there / "directory.npz").write_bytes(small)
    with zipfile.ZipFile(there / "members.npz", "w") as archive:
        for index in range(20_000):
            archive.writestr(f"{index}.npy", npy_header((1,)))
    with zipfile.ZipFile(there / "twice.npz", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(2):
            archive.writestr("latents.npy", npy_header((1, 16, 8, 8)) + bytes(4096))
    deep = b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b"."
    with zipfile.ZipFile(there / "deep.pt", "w") as archive:
        archive.writestr("archive/data.pkl", deep)
        archive.writestr("archive/version", "3\n")
    (there / "plain.pt").write_bytes(pickle.dumps({"latents": [0.0] * 1024}, protocol=4))
    for name, header in {
        "deep.safetensors": b'{"__metadata__":' + b'{"a":' * 100_000,
        "long.safetensors": b"{}",
        "overflow.safetensors": b'{"latents":{"dtype":"F32","shape":[8589934592,8589934592],"data_offsets":[0,0]}}',
        "claims.latent": b'{"latent_tensor":{"dtype":"F32","shape":[16,99999,99999],"data_offsets":[0,639987200064]}}',
    }.items():
        size = 2**62 if name == "long.safetensors" else len(header)
        (there / name).write_bytes(struct.pack("<Q", size) + header)
    os.mkfifo(there / "pipe.npy")
    os.mkfifo(there / "pipe.parquet")
    (there / "device.npy").symlink_to("/dev/zero")
    names = pa.table({"latents": [[0.0]] * 16, "name": ["a" * (16 * 2**20)] * 16})
    pq.write_table(names, there / "names.parquet", compression="zstd", row_group_size=1, use_dictionary=False)
    return {
        "directory.npz": "Bad CRC-32",
        "members.npz": "expected a tensor named 'latents', or one tensor only",
        "twice.npz": "it holds two arrays of one name",
        "deep.pt": "latents: got list, expected a tensor",
        "plain.pt": "a pickle of Python's own, which torch.save did not write",
        "deep.safetensors": "cannot be read as safetensors",
        "long.safetensors": "header too large",
        "overflow.safetensors": "overflow computing buffer size",
        "claims.latent": "file not fully covered",
        "header.npy": "claims a header of 3221225472 bytes",
        "old.pt": "got 1099511627776 bytes in the format that torch.save had before PyTorch 1.6",
        "pipe.npy": "is a pipe, a device or a folder",
        "pipe.parquet": "is a pipe, a device or a folder",
        "device.npy": "is a pipe, a device or a folder",
        "names.parquet": "all row groups of name: claims",
        "zeros.npz": "claims 134217856 bytes",
        "rows.npz": "claims 134217856 bytes",
        "pickle.pt": "claims 134217728 bytes",
        "expanded.pt": "claims 160000000000 bytes",
        "many.pt": "claims 16777216000000 bytes",
        "bytes.pt": "refused, for it holds a bytearray",
        "ids.pt": "latent_ids: got shape (1000000000, 4) for 1 latents of 16 patches",
        "legacy.pt": "claims 160000000000 bytes",
        "gzip.pt": "unpacks to more than",
        "sparse.npy": "which decode to 17179869184 pixels, more than the 268435456",
        "objects.npy": "got an array of Python objects, expected numbers",
        "shared.parquet": "shape: got [16, 8, 8] for 1048576 values",
        "lists.parquet": "row group 0 of latents.list.element: claims 100663296 bytes",
    }


def test_bombs_are_refused_and_the_rest_is_done(tmp_path: Path, demo: Decoder) -> None:
    """The job runs in a process of its own, whose memory stays far below what the files claim."""
    made = folder_of(tmp_path / "good", 2)
    there = tmp_path / "in"
    folder_of(there, 2)
    expected = bombs(there)
    jobs = [[str(tmp_path / "good"), str(tmp_path / "before")], [str(there), str(tmp_path / "out")]]
    command = [sys.executable, "-c", _MEASURED, json.dumps(jobs), *CPU]
    ran = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280, check=False
    )
    (good, before), (bad, peak) = json.loads(ran.stderr.splitlines()[-1])
    assert (good, bad) == (0, 6), ran.stderr
    told: dict[str, list[str]] = {}
    for line in failures(tmp_path / "out"):
        told.setdefault(Path(line["source"]).name, []).append(line["message"])
    assert told.keys() == expected.keys(), json.dumps(told, indent=1)
    for name, words in expected.items():
        assert all(words in message for message in told[name]), told[name]
    for name, tensor in made.items():
        assert np.array_equal(image(tmp_path / f"out/{name}.png"), pixels(demo, tensor))
    assert peak < before + 400, f"{peak} MiB with bombs, {before} without"
