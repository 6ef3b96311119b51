"""The model folder: where it lies, and a copy of it with the settings of one server."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from fluxvae.errors import FluxVAEError, InvalidOptionError

__all__ = ["MODEL", "model_folder", "write_repository"]

MODEL = "vae_decoder"
_DEVICE = re.compile(r"auto|cpu|cuda(?::(\d+))?")


def model_folder() -> Path:
    """The ``vae_decoder`` folder: inside the installed package, or at the root of a clone.

    Raises:
        FluxVAEError: it is in neither place.
    """
    package = Path(__file__).parents[1] / "triton_models" / MODEL  # put there when the wheel is built: pyproject.toml
    clone = Path(__file__).parents[4] / "triton_models" / MODEL
    for folder in (package, clone):
        if (folder / "config.pbtxt").is_file():
            return folder
    raise FluxVAEError(f"Triton's model folder is neither at {package} nor at {clone}; install fluxvae again")


def write_repository(into: Path, settings: Mapping[str, str], *, device: str = "auto") -> Path:
    """Make a model repository whose ``config.pbtxt`` holds these settings.

    Args:
        into: a folder to be made.
        settings: values for the config's own ``parameters``, as text; those not named keep the value they have.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``: where Triton makes the instances.

    Returns:
        ``into``, for ``tritonserver --model-repository``.

    Raises:
        InvalidOptionError: an unknown device.
        FluxVAEError: the config has no such parameter.
    """
    source = model_folder()
    config = (source / "config.pbtxt").read_text()
    for name, value in settings.items():
        pattern = rf'(key:\s*"{re.escape(name)}"\s*value:\s*\{{\s*string_value:\s*)"(?:[^"\\]|\\.)*"'
        config = _replace(pattern, rf"\g<1>{_quoted(value)}", config, f"parameter {name!r}")
    config = _place_instances(config, device)
    model = into / MODEL
    shutil.copytree(source, model, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    (model / "config.pbtxt").write_text(config)
    return into


def _place_instances(config: str, device: str) -> str:
    match = _DEVICE.fullmatch(device)
    if match is None:
        raise InvalidOptionError(f"device: got {device!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if device == "auto":
        return config
    kind = "KIND_CPU" if device == "cpu" else "KIND_GPU"
    gpus = f" gpus: [ {match[1]} ]" if match[1] else ""
    return _replace(r"kind:\s*KIND_AUTO\b", f"kind: {kind}{gpus}", config, "instance_group kind: KIND_AUTO")


def _replace(pattern: str, new: str, config: str, what: str) -> str:
    config, count = re.subn(pattern, new, config)
    if count != 1:
        raise FluxVAEError(f"config.pbtxt of {MODEL}: found {count} times {what}, expected it once; was it edited?")
    return config


def _quoted(value: str) -> str:
    """A string of protobuf's text format, in the form ``re.sub`` takes."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'.replace("\\", "\\\\")
