"""Find a ``tritonserver``, and make its Python models run with this environment's Python and packages."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from fluxvae.errors import FluxVAEError

__all__ = ["Installation", "TritonServerError", "find_tritonserver"]

_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class TritonServerError(FluxVAEError):
    """Triton is not installed, did not become ready, or cannot run with this Python."""


class Installation(NamedTuple):
    """Where a ``tritonserver`` was found."""

    binary: Path
    wheel: Path | None
    """The nvidia-pytriton wheel's ``pytriton/tritonserver`` folder; None when the binary was on the PATH."""

    def __str__(self) -> str:
        if self.wheel is None:
            return str(self.binary)
        return f"{self.binary} (the nvidia-pytriton wheel: for tests and local use, not for production)"

    def check(self) -> None:
        """Whether the wheel can run models of this Python, before anything is made of it.

        Raises:
            TritonServerError: it cannot, and what to do.
        """
        if self.wheel is not None:
            _stub(self.wheel)
            _libpython_folder()

    def prepare(self, folder: Path, environment: dict[str, str]) -> list[str]:
        """Arguments the server needs on top of a user's; fills ``environment`` and a ``folder`` of the caller's.

        Raises:
            TritonServerError: the wheel cannot run models of this Python.
        """
        # The stub takes the packages of the first python3 on the PATH, and nothing else tells it where they are.
        environment["PATH"] = os.pathsep.join([f"{sys.prefix}/bin", environment.get("PATH", os.defpath)])
        environment["PYTHONUNBUFFERED"] = "1"  # so that what a dying model printed is in the log
        if self.wheel is None:
            return []
        libraries = [str(self.wheel.parents[1] / "nvidia_pytriton.libs"), _libpython_folder()]
        libraries.append(environment.get("LD_LIBRARY_PATH"))
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(library for library in libraries if library)
        return [f"--backend-directory={_link_backends(self.wheel, folder / 'backends')}"]

    def needs_leave_for_shared_memory(self, environment: dict[str, str]) -> bool:
        """Whether this server takes shared memory of clients only where its command line says so: from 26.05 on.

        Args:
            environment: in which it is run, as `prepare` left it.
        """
        described = subprocess.run(
            [self.binary, "--help"], env=environment, capture_output=True, timeout=60, check=False
        )
        return b"--allow-client-shm" in described.stdout + described.stderr


def find_tritonserver() -> Installation:
    """The ``tritonserver`` on the PATH, else the nvidia-pytriton wheel's.

    Raises:
        TritonServerError: there is neither.
    """
    if on_path := shutil.which("tritonserver"):
        return Installation(Path(on_path), None)
    spec = importlib.util.find_spec("pytriton")
    for location in (spec and spec.submodule_search_locations) or ():
        root = Path(location) / "tritonserver"
        if (binary := root / "bin" / "tritonserver").is_file():
            return Installation(binary, root)
    raise TritonServerError(
        "tritonserver: found neither on the PATH nor in an nvidia-pytriton wheel. Run inside NVIDIA's Triton "
        "container, or for local use: pip install 'nvidia-pytriton==0.7.0' 'numpy<2'"
    )


def _libpython_folder() -> str | None:
    """The folder of this Python's shared library, which the stub links to; None: the loader knows it."""
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
    """The wheel's program that runs models of this Python."""
    stub = wheel / "python_backend_stubs" / _PYTHON / "triton_python_backend_stub"
    if not stub.is_file():
        has = ", ".join(sorted(path.name for path in (wheel / "python_backend_stubs").glob("*")))
        raise TritonServerError(f"Python {_PYTHON}: this wheel has no stub for it, only for {has or 'none'}")
    return stub


def _link_backends(wheel: Path, into: Path) -> Path:
    """A backend directory with the stub of the running Python beside the backend; the wheel stays as it is."""
    stub = _stub(wheel)
    python = into / "python"
    python.mkdir(parents=True)
    for path in [*(wheel / "backends" / "python").iterdir(), stub]:
        (python / path.name).symlink_to(path)  # links: $ORIGIN in the library paths must lead back to the wheel
    return into
