"""What `fluxvae serve` looks at before it starts anything: what would otherwise fail late, or corrupt images."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Mapping
from pathlib import Path

import fluxvae.errors
from fluxvae.errors import FluxVAEError, InvalidOptionError
from fluxvae.serve.triton.installation import Installation, TritonServerError
from fluxvae.serve.triton.ports import free_ports

__all__ = ["check_numpy", "check_positive", "check_shared_memory", "choose_ports", "is_loopback", "model_error"]

_SHM = Path("/dev/shm")
_REGION_GROWTH = 2  # a region grows to 1.5 to 2 times its largest request and answer together, and never shrinks
_LATENT_BYTES, _UINT8_BYTES, _FLOAT_BYTES = 1, 3, 12  # per pixel: 64 float32 for 16x16 pixels, and the outputs
_MODEL_ERROR = re.compile(r"TritonModelException: (\w+): (.+?)\s*$", flags=re.MULTILINE)


def check_numpy(installation: Installation) -> None:
    """The wheel's stub reads NumPy 2's tensors wrongly, without an error; the model would refuse too, only later.

    Raises:
        TritonServerError: NumPy 2 or later beside the wheel's server.
    """
    version = importlib.metadata.version("numpy")
    if installation.wheel is not None and int(version.partition(".")[0]) >= 2:
        raise TritonServerError(
            f"NumPy {version} and the nvidia-pytriton wheel's Python stub corrupt each other's tensors without an "
            "error; install 'numpy<2' in this environment, or run in NVIDIA's Triton container, 24.11 or later"
        )


def check_shared_memory(max_pixels: int, models: int = 1, folder: Path = _SHM) -> str | None:
    """Whether what Triton and its Python process exchange fits.

    Args:
        max_pixels: of the largest request.
        models: how many there are; each has a region of its own, which never shrinks.

    Returns:
        A warning, where a large float32 answer would not fit.

    Raises:
        TritonServerError: not even a large uint8 answer would.
    """
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    needed = models * _REGION_GROWTH * (_LATENT_BYTES + _UINT8_BYTES) * max_pixels
    if free < needed:
        raise TritonServerError(
            f"shared memory: {folder} has {_mb(free)} free, and requests of {max_pixels} pixels to "
            f"{models} model{'s' if models > 1 else ''} need {_mb(needed)}; "
            "give it more (docker run --shm-size=2g; in Kubernetes an emptyDir of medium Memory on /dev/shm), or lower "
            "--max-pixels"
        )
    roomy = models * _REGION_GROWTH * (_LATENT_BYTES + _FLOAT_BYTES) * max_pixels
    if free < roomy:
        return (
            f"shared memory: {folder} has {_mb(free)} free; float32 outputs of {max_pixels} pixels would need "
            f"{_mb(roomy)} and may fail; images and images_encoded will not"
        )
    return None


def choose_ports(gateway: tuple[str, int], triton_host: str, triton: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """Each 0 replaced by a free port, and a taken one named by its option, before anything is started.

    Args:
        gateway: host and port of the gateway.
        triton_host, triton: host of Triton's endpoints, and their ports by option.

    Raises:
        TritonServerError: a port is taken, or wanted twice.
    """
    host, port = gateway
    everything = {"--port": port, **triton}
    for option, wanted in everything.items():
        same = [other for other, value in everything.items() if value == wanted]
        if wanted and len(same) > 1:
            raise TritonServerError(f"{' and '.join(same)}: both {wanted}; choose another, or 0 for a free one")
        try:
            free_ports(host if option == "--port" else triton_host, [wanted])
        except TritonServerError as error:
            raise TritonServerError(f"{option}: {error}") from error
    found = free_ports(triton_host, list(triton.values()))
    while (chosen := free_ports(host, [port])[0]) in found:  # only a free one of ours can be the same: look again
        continue
    return chosen, dict(zip(triton, found, strict=True))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what is bound to ``host``."""
    return host in ("localhost", "::1") or host.startswith("127.")


def model_error(log: str) -> FluxVAEError | None:
    """The error with which the model refused to load, as itself, from Triton's log."""
    match = _MODEL_ERROR.search(log)
    if match is None:
        return None
    kind = getattr(fluxvae.errors, match[1], None)
    if isinstance(kind, type) and issubclass(kind, FluxVAEError):
        return kind(match[2])
    return None


def check_positive(**values: float | None) -> None:
    """Refuse numbers that must be above 0.

    Raises:
        InvalidOptionError: names the first.
    """
    for name, value in values.items():
        if value is not None and not value > 0:
            raise InvalidOptionError(f"{name}: got {value}, expected a number above 0")


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.0f} MB"
