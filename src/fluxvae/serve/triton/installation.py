"""Finds a ``tritonserver``, and makes its Python models run with this environment's Python and packages."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from fluxvae.errors import FluxVAEError

__all__ = ["Installation", "TritonServerError", "check_system", "find_tritonserver"]

_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_WHEEL_RUNS_HERE = (3, 10) <= sys.version_info < (3, 13) and platform.machine() == "x86_64"


class TritonServerError(FluxVAEError):
    """Triton is not installed, did not become ready, or cannot run with this Python."""


class Installation(NamedTuple):
    """A ``tritonserver`` that was found, and whether it is the nvidia-pytriton wheel's."""

    binary: Path
    wheel: Path | None
    """The nvidia-pytriton wheel's ``pytriton/tritonserver`` folder. None where the binary was found on the PATH."""

    def __str__(self) -> str:
        if self.wheel is None:
            return str(self.binary)
        return f"{self.binary} (the nvidia-pytriton wheel: for tests and local use, not for production)"

    def check(self) -> None:
        """Check that the wheel can run models in this version of Python, before anything is started.

        Raises:
            TritonServerError: it cannot; the message says what to do.
        """
        if self.wheel is not None:
            _stub(self.wheel)
            _libpython_folder()

    def prepare(self, folder: Path, environment: dict[str, str]) -> list[str]:
        """Prepare the environment and the files that the server needs to run our models.

        Args:
            folder: a folder of the caller's, into which the wheel's backends are linked.
            environment: the server's environment, which is changed in place.

        Returns:
            The arguments that ``tritonserver`` needs because of this.

        Raises:
            TritonServerError: the wheel cannot run models in this version of Python.
        """
        # Triton's stub uses the packages of the first python3 on the PATH, and can be told of them in no other way.
        environment["PATH"] = os.pathsep.join([f"{sys.prefix}/bin", environment.get("PATH", os.defpath)])
        environment["PYTHONUNBUFFERED"] = "1"  # so that what a dying model printed is in the log
        if self.wheel is None:
            return []
        libraries = [str(self.wheel.parents[1] / "nvidia_pytriton.libs"), _libpython_folder()]
        libraries.append(environment.get("LD_LIBRARY_PATH"))
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(library for library in libraries if library)
        return [f"--backend-directory={_link_backends(self.wheel, folder / 'backends')}"]

    def needs_leave_for_shared_memory(self, environment: dict[str, str]) -> bool:
        """Return whether this server needs an option to take shared memory of clients, as Triton does from 26.05 on.

        Its help text tells, so the server is run once for it.

        Args:
            environment: the environment to run the server in, as `prepare` left it.
        """
        described = subprocess.run(
            [self.binary, "--help"], env=environment, capture_output=True, timeout=60, check=False
        )
        return b"--allow-client-shm" in described.stdout + described.stderr


def check_system() -> None:
    """Refuse to start a server where there is no Triton: on every system but Linux.

    Raises:
        TritonServerError: this is not Linux.
    """
    if sys.platform != "linux":
        raise TritonServerError(
            f"tritonserver: this system is {sys.platform}, and Triton Inference Server runs on Linux only. Start the "
            "server on a Linux machine or in a container (docs/serving.md), and decode and encode with it from here by "
            "fluxvae.client; or decode here without a server, by fluxvae decode or fluxvae.Decoder"
        )


def find_tritonserver() -> Installation:
    """Find the ``tritonserver`` on the PATH or, if there is none, the one in the nvidia-pytriton wheel.

    Raises:
        TritonServerError: there is neither, or this is not Linux.
    """
    check_system()
    if on_path := shutil.which("tritonserver"):
        return Installation(Path(on_path), None)
    spec = importlib.util.find_spec("pytriton")
    for location in (spec and spec.submodule_search_locations) or ():
        root = Path(location) / "tritonserver"
        if (binary := root / "bin" / "tritonserver").is_file():
            return Installation(binary, root)
    instead = "Run inside NVIDIA's Triton container (docs/serving.md)"
    if _WHEEL_RUNS_HERE:
        raise TritonServerError(
            f"tritonserver: found neither on the PATH nor in an nvidia-pytriton wheel. {instead}, or for local use: "
            "pip install 'nvidia-pytriton==0.7.0' 'numpy<2'"
        )
    raise TritonServerError(
        f"tritonserver: not on the PATH. {instead}. The nvidia-pytriton wheel, which brings one for local use, is for "
        f"Python 3.10 to 3.12 on x86-64 only, and this is Python {_PYTHON} on {platform.machine()}. Without "
        "a server here, fluxvae decode works on files, and fluxvae.client asks a server elsewhere"
    )


def _libpython_folder() -> str | None:
    """Return the folder of this Python's shared library, which Triton's stub links to.

    Returns:
        None where the system's loader finds the library by itself.

    Raises:
        TritonServerError: the library is not there.
    """
    name = f"libpython{_PYTHON}.so.1.0"
    for folder in (sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64"):
        if folder and Path(folder, name).is_file():
            return str(folder)
    if ctypes.util.find_library(f"python{_PYTHON}"):
        return None
    raise TritonServerError(
        f"{name}: not found for the Python at {sys.base_prefix}, and Triton's Python stub needs it. Use a Python "
        f"built with its shared library (uv python install {_PYTHON}), or apt install libpython{_PYTHON}"
    )


def _stub(wheel: Path) -> Path:
    """Return the wheel's stub, the program that runs models, for this version of Python."""
    stub = wheel / "python_backend_stubs" / _PYTHON / "triton_python_backend_stub"
    if not stub.is_file():
        has = ", ".join(sorted(path.name for path in (wheel / "python_backend_stubs").glob("*")))
        raise TritonServerError(
            f"Python {_PYTHON}: this wheel has no stub for it, only for {has or 'none'}; use one of these versions, or "
            "run in NVIDIA's Triton container"
        )
    return stub


def _link_backends(wheel: Path, into: Path) -> Path:
    """Make a backend directory in which the stub for this Python lies beside the backend; the wheel is not changed."""
    stub = _stub(wheel)
    python = into / "python"
    python.mkdir(parents=True)
    for path in [*(wheel / "backends" / "python").iterdir(), stub]:
        # Links rather than copies, because $ORIGIN in the paths of their libraries must lead back into the wheel.
        (python / path.name).symlink_to(path)
    return into
