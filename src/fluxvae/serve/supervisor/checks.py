"""What `fluxvae serve` checks before it starts anything, because it would otherwise fail late or corrupt images."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path

import fluxvae.errors
from fluxvae.errors import FluxVAEError, InvalidOptionError
from fluxvae.extras import needs
from fluxvae.serve.triton.installation import Installation, TritonServerError
from fluxvae.serve.triton.ports import free_ports

__all__ = [
    "check_numpy",
    "check_packages",
    "check_positive",
    "check_shared_memory",
    "choose_ports",
    "is_loopback",
    "model_error",
]

_SHM = Path("/dev/shm")
# A model's region grows to 1.5 to 2 times the size of its largest request and answer together, and never shrinks.
_REGION_GROWTH = 2
# Bytes per pixel. Latents are 64 float32 values for 16x16 pixels; an answer is three uint8 or three float32 values.
_LATENT_BYTES, _UINT8_BYTES, _FLOAT_BYTES = 1, 3, 12
_MODEL_ERROR = re.compile(r"TritonModelException: (\w+): (.+?)\s*$", flags=re.MULTILINE)


_GATEWAY_PACKAGES = ("grpc", "httptools", "prometheus_client", "starlette", "tritonclient", "uvicorn")


def check_packages() -> None:
    """Look for what the gateway imports, which is a process of its own and starts after Triton.

    They are not imported here, because the supervisor would take twice its memory.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    with needs("serve", "fluxvae serve"):
        for name in _GATEWAY_PACKAGES:
            if importlib.util.find_spec(name) is None:
                raise ModuleNotFoundError(f"No module named {name!r}")


def check_numpy(installation: Installation) -> None:
    """Refuse NumPy 2 beside the wheel's Triton, whose Python stub reads its tensors wrongly without an error.

    The model refuses NumPy 2 as well, but only after Triton has started.

    Raises:
        TritonServerError: the server is the nvidia-pytriton wheel's, and NumPy is version 2 or later.
    """
    version = importlib.metadata.version("numpy")
    if installation.wheel is not None and int(version.partition(".")[0]) >= 2:
        raise TritonServerError(
            f"NumPy {version} and the nvidia-pytriton wheel's Python stub corrupt each other's tensors without an "
            "error; install 'numpy<2' in this environment, or run in NVIDIA's Triton container, 24.11 or later"
        )


def check_shared_memory(max_pixels: int, models: int = 1, folder: Path = _SHM) -> str | None:
    """Check that shared memory has room for what Triton and its Python processes exchange: latents and images.

    Args:
        max_pixels: the pixels of the largest request that is allowed.
        models: how many models are served. Each has a region of its own, which never shrinks.
        folder: where shared memory is mounted.

    Returns:
        A warning, where uint8 answers to the largest request fit but float32 answers do not; otherwise None.

    Raises:
        TritonServerError: not even uint8 answers to the largest request fit.
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
    """Choose all ports before anything is started: a 0 becomes a free port, and any other port must be free.

    Args:
        gateway: the host and port of the gateway.
        triton_host: the host of Triton's endpoints.
        triton: the ports of Triton's endpoints by the option that sets them, such as ``--http-port``.

    Returns:
        The gateway's port, and Triton's ports by option.

    Raises:
        TritonServerError: a port is taken, or two options want the same one. The message names the options.
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
    # A free port found for the gateway may be one of those just found for Triton, which nobody has bound yet.
    while (chosen := free_ports(host, [port])[0]) in found:
        continue
    return chosen, dict(zip(triton, found, strict=True))


def is_loopback(host: str) -> bool:
    """Return whether what is bound to ``host`` can be reached from this machine only."""
    return host in ("localhost", "::1") or host.startswith("127.")


def model_error(log: str) -> FluxVAEError | None:
    """Find in Triton's log the error with which the model refused to load, and return it as the class it was raised as.

    Returns:
        None where the log holds no such error, or one that is not fluxvae's.
    """
    match = _MODEL_ERROR.search(log)
    if match is None:
        return None
    kind = getattr(fluxvae.errors, match[1], None)
    if isinstance(kind, type) and issubclass(kind, FluxVAEError):
        return kind(match[2])
    return None


def check_positive(**values: float | None) -> None:
    """Refuse numbers that are not above 0. None stands for an option that was left out.

    Raises:
        InvalidOptionError: names the first such number.
    """
    for name, value in values.items():
        if value is not None and not value > 0:
            raise InvalidOptionError(f"{name}: got {value}, expected a number above 0")


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.0f} MB"
