"""Finds our Triton model folders, and makes copies of them that hold the settings of one server."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from fluxvae.errors import FluxVAEError, InvalidOptionError

__all__ = ["model_folder", "write_repository"]

_DEVICE = re.compile(r"auto|cpu|cuda(?::(\d+))?")


def model_folder(name: str) -> Path:
    """Find the folder of one of `fluxvae.serve.models.MODELS`, inside the installed package or at the root of a clone.

    Raises:
        FluxVAEError: it is in neither place.
    """
    # pyproject.toml has the folder copied here when a wheel is built.
    package = Path(__file__).parents[1] / "triton_models" / name
    clone = Path(__file__).parents[4] / "triton_models" / name
    for folder in (package, clone):
        if (folder / "config.pbtxt").is_file():
            return folder
    raise FluxVAEError(f"Triton's model folder is neither at {package} nor at {clone}; install fluxvae again")


def write_repository(into: Path, models: Mapping[str, Mapping[str, str]], *, device: str = "auto") -> Path:
    """Make a model repository of these models, whose ``config.pbtxt`` files hold the given settings.

    Args:
        into: the folder to make.
        models: for each model by name, the values of its config's ``parameters`` as text. A parameter that is not named
            keeps the value that it has.
        device: where Triton makes the models' instances: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

    Returns:
        ``into``, for ``tritonserver --model-repository``.

    Raises:
        InvalidOptionError: the device is unknown.
        FluxVAEError: a config has no parameter of a name that is given.
    """
    for model, settings in models.items():
        source = model_folder(model)
        config = (source / "config.pbtxt").read_text(encoding="utf-8")
        for name, value in settings.items():
            pattern = rf'(key:\s*"{re.escape(name)}"\s*value:\s*\{{\s*string_value:\s*)"(?:[^"\\]|\\.)*"'
            config = _replace(pattern, rf"\g<1>{_quoted(value)}", config, model, f"parameter {name!r}")
        config = _place_instances(config, model, device)
        shutil.copytree(source, into / model, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        (into / model / "config.pbtxt").write_text(config, encoding="utf-8")
    return into


def _place_instances(config: str, model: str, device: str) -> str:
    match = _DEVICE.fullmatch(device)
    if match is None:
        raise InvalidOptionError(f"device: got {device!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if device == "auto":
        return config
    kind = "KIND_CPU" if device == "cpu" else "KIND_GPU"
    gpus = f" gpus: [ {match[1]} ]" if match[1] else ""
    return _replace(r"kind:\s*KIND_AUTO\b", f"kind: {kind}{gpus}", config, model, "instance_group kind: KIND_AUTO")


def _replace(pattern: str, new: str, config: str, model: str, what: str) -> str:
    config, count = re.subn(pattern, new, config)
    if count != 1:
        raise FluxVAEError(f"config.pbtxt of {model}: found {count} times {what}, expected it once; was it edited?")
    return config


def _quoted(value: str) -> str:
    """Quote a value as a string of protobuf's text format, with its backslashes doubled once more for ``re.sub``."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'.replace("\\", "\\\\")
