"""Asks cuDNN what it would do on a card that is not here: which engine, with which properties, and how much workspace.

From version 9.8 on cuDNN plans for a card that is described to it and needs no driver for that. It is asked as PyTorch
asks it (ATen's ``native/cudnn/Conv_v8.cpp``): its heuristics propose engines, then its list for all other cases does;
those that are not allowed are left out; and the first with which a plan can be made is taken. The numbers below are
those of the header ``cudnn_graph_v9.h``.
"""

from __future__ import annotations

import ctypes
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fake_card import Card, Convolution, fake_vae, faked_card
from fluxvae.engine.exact import ExactDecoder, ExactEncoder

__all__ = ["OLDEST", "Answer", "ask", "convolutions", "forbidden", "library", "version"]

OLDEST = 90800
"""The first version to which a card can be described."""

NOTES = {0: "tensor cores", 1: "converts down", 4: "not deterministic", 5: "Winograd"}
_DESCRIPTORS = {
    "convolution": 1, "engine": 2, "config": 3, "heuristics": 4, "plan": 5, "forward": 10, "graph": 15, "tensor": 17,
    "device": 38,
}  # fmt: skip
_TYPES: dict[str, tuple[int, Any]] = {
    "dtype": (1, ctypes.c_int),
    "int64": (3, ctypes.c_int64),
    "float": (4, ctypes.c_float),
    "convolution mode": (7, ctypes.c_int),
    "heuristics mode": (8, ctypes.c_int),
    "note": (11, ctypes.c_int),
    "descriptor": (15, ctypes.c_void_p),
    "char": (24, ctypes.c_char),
}
_DTYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 9}
_INSTANT, _FALLBACK = 0, 2
_MOST = 64


class Answer(NamedTuple):
    """What cuDNN would do for one convolution on one card."""

    engine: int
    """cuDNN's own number of it; -1 where there is none."""
    notes: frozenset[str]
    workspace: int
    """Bytes."""


@cache
def library() -> Any:
    """cuDNN, as it comes with a PyTorch for CUDA.

    Raises:
        ImportError: it does not.
    """
    import nvidia.cudnn

    (folder,) = nvidia.cudnn.__path__
    library = ctypes.CDLL(str(Path(folder) / "lib" / "libcudnn.so.9"))
    library.cudnnGetVersion.restype = ctypes.c_size_t
    library.cudnnGetErrorString.restype = ctypes.c_char_p
    return library


def version() -> int:
    return int(library().cudnnGetVersion())


def forbidden(convolution: Convolution) -> set[str]:
    """Properties of engines that PyTorch does not take for such a convolution."""
    notes = {"converts down"}
    if convolution.deterministic:
        notes.add("not deterministic")
    if convolution.dtype == torch.float32 and not convolution.tf32:
        notes.add("tensor cores")
    return notes


def ask(card: Card, convolution: Convolution) -> Answer:
    device, graph = _device(card), _graph(convolution)
    for mode in (_INSTANT, _FALLBACK):
        for config in _configs(device, graph, mode):
            engine = _Descriptor("engine")
            config.get(300, "descriptor", 1, (ctypes.c_void_p * 1)(engine.pointer))
            notes = frozenset(NOTES[note] for note in engine.get(1303, "note", 10) if note in NOTES)
            if notes & forbidden(convolution):
                continue
            try:
                plan = _Descriptor("plan").set(401, "descriptor", config).set(407, "descriptor", device).done()
            except _Refused:
                continue  # as PyTorch goes on to the next
            return Answer(engine.get(1301, "int64", 1)[0], notes, plan.get(402, "int64", 1)[0])
    return Answer(-1, frozenset(), 0)


def convolutions(
    dtypes: Iterable[torch.dtype], models: Iterable[str], sizes: Iterable[int], *, encode: bool
) -> Counter[Convolution]:
    """How often decodes, and encodes too, of these sizes in pixels ask for each; it does not depend on the card."""
    with faked_card(90) as launches:
        for dtype in dtypes:
            for model in models:
                vae = fake_vae(dtype, model)
                for size in sizes:
                    decoder, side = ExactDecoder(vae), size // 8
                    decoder.decode(torch.empty(1, decoder.network.in_channels, side, side, dtype=dtype, device="cuda"))
                    if encode:
                        ExactEncoder(vae).encode(torch.empty(1, 3, size, size, dtype=dtype, device="cuda"))
    return launches.convolutions


class _Refused(Exception):
    """cuDNN cannot do that."""


def _check(status: int) -> None:
    if status:
        raise _Refused(f"{status}: {library().cudnnGetErrorString(status).decode()}")


class _Descriptor:
    """One of cuDNN's backend descriptors; it keeps those that it refers to."""

    def __init__(self, kind: str) -> None:
        self.pointer, self._kept = ctypes.c_void_p(), list[Any]()
        _check(library().cudnnBackendCreateDescriptor(_DESCRIPTORS[kind], ctypes.byref(self.pointer)))

    def set(self, name: int, kind: str, *values: Any) -> _Descriptor:
        number, type_ = _TYPES[kind]
        self._kept.extend(values if kind == "descriptor" else ())
        array = (type_ * len(values))(*(one.pointer if isinstance(one, _Descriptor) else one for one in values))
        _check(library().cudnnBackendSetAttribute(self.pointer, name, number, ctypes.c_int64(len(values)), array))
        return self

    def done(self) -> _Descriptor:
        _check(library().cudnnBackendFinalize(self.pointer))
        return self

    def get(self, name: int, kind: str, most: int, into: Any = None) -> list[Any]:
        (number, type_), count = _TYPES[kind], ctypes.c_int64()
        array = (type_ * most)() if into is None else into
        _check(
            library().cudnnBackendGetAttribute(
                self.pointer, name, number, ctypes.c_int64(most), ctypes.byref(count), array
            )
        )
        return list(array)[: count.value]

    def __del__(self) -> None:
        library().cudnnBackendDestroyDescriptor(self.pointer)


@cache
def _device(card: Card) -> _Descriptor:
    """The card. Beside what `Card` says, the numbers are an H100's; cuDNN chooses by the others."""
    told = json.dumps(
        {
            "deviceVer": 10 * card.capability, "driverVer": 13000, "cudaDeviceId": 0, "deviceName": card.name,
            "multiProcessorCount": card.multi_processor_count, "maxGridSize": [2147483647, 65535, 65535],
            "maxBlockSize": [1024, 1024, 64], "regsPerBlock": 65536, "warpSize": 32, "maxSharedMemoryPerBlock": 49152,
            "maxSharedMemoryPerBlockOptin": card.shared_memory_per_block_optin, "reservedSharedMemoryPerBlock": 1024,
            "maxRegistersPerSM": 65536, "maxCtasPerSM": 32, "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048,
            "pciDeviceId": 0, "isTccDriver": 0, "supportCoopLaunch": 1, "smClockRateKHz": 1980000,
            "memClockRateKHz": 2619000, "l2CacheSize": 52428800, "totalGlobalMem": card.total_memory,
            "cudnnVersion": version(),
        }
    )  # fmt: skip
    return _Descriptor("device").set(2702, "char", *(bytes([byte]) for byte in told.encode() + b"\0")).done()


def _graph(convolution: Convolution) -> _Descriptor:
    rows, width, cin, cout, taps, padding, stride, dtype, *_ = convolution
    size = [
        (length + 2 * pad - tap) // step + 1
        for length, pad, tap, step in zip((rows, width), padding, taps, stride, strict=True)
    ]

    def tensor(uid: int, count: int, channels: int, height: int, across: int) -> _Descriptor:
        strides = (height * across * channels, 1, across * channels, channels)
        made = (
            _Descriptor("tensor").set(901, "dtype", _DTYPES[dtype]).set(902, "int64", count, channels, height, across)
        )
        return made.set(903, "int64", *strides).set(906, "int64", uid).set(900, "int64", 16).done()

    how = _Descriptor("convolution").set(106, "int64", 2).set(100, "dtype", _DTYPES[torch.float32])
    how.set(101, "convolution mode", 1).set(102, "int64", 1, 1).set(103, "int64", *stride)
    how.set(104, "int64", *padding).set(105, "int64", *padding).done()
    forward = _Descriptor("forward").set(702, "descriptor", how).set(700, "float", 1.0).set(701, "float", 0.0)
    forward.set(704, "descriptor", tensor(1, 1, cin, rows, width)).set(703, "descriptor", tensor(2, cout, cin, *taps))
    forward.set(705, "descriptor", tensor(3, 1, cout, *size)).done()
    return _Descriptor("graph").set(801, "descriptor", forward).done()


def _configs(device: _Descriptor, graph: _Descriptor, mode: int) -> Iterator[_Descriptor]:
    """The engines, each with its settings, that cuDNN proposes in this mode, the best first."""
    try:
        heuristics = _Descriptor("heuristics").set(201, "descriptor", graph).set(200, "heuristics mode", mode)
        heuristics.set(204, "descriptor", device).done()
        configs = [_Descriptor("config") for _ in range(_MOST)]
        array = (ctypes.c_void_p * _MOST)(*(config.pointer for config in configs))
        yield from configs[: len(heuristics.get(202, "descriptor", _MOST, array))]
    except _Refused:
        return
