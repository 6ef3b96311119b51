"""What the Triton model does before it serves: it reads its settings, and proves that it can compute and answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fluxvae.decoder import Decoder
from fluxvae.encoder import Encoder
from fluxvae.errors import CheckpointError, FluxVAEError, InvalidOptionError
from fluxvae.photographs import ignore_warnings
from fluxvae.serve.model.decoding import Decoding
from fluxvae.serve.model.encoding import Encoding
from fluxvae.serve.model.work import Work
from fluxvae.serve.models import model_for

__all__ = ["Settings", "check_tensor_exchange", "make_work", "warm_up"]

_ENVIRONMENT = {"device": "FLUXVAE_DEVICE", "memory_limit": "FLUXVAE_MEMORY_LIMIT"}
_OWN_VARIABLES = {
    "AutoencoderKLFlux2": "FLUXVAE_FLUX2_",
    "AutoencoderKLQwenImage": "FLUXVAE_QWEN_IMAGE_",
    "AutoencoderTiny": "FLUXVAE_PREVIEW_",
}
"""What the variables CHECKPOINT and FAMILY begin with, by the first ``vae_class``, because models of different classes
share one environment. For other classes they begin with FLUXVAE_."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one model: the ``parameters`` in its ``config.pbtxt``.

    Those without a description are as for `fluxvae.Decoder.from_pretrained`, to which None leaves the choice.
    """

    checkpoint: str = "demo"
    vae_class: str | None = None
    """The class in diffusers that the checkpoint must be of, or several, with commas between them; None: any."""
    encodes: bool = False
    """Whether the model turns pictures into latents; otherwise it turns latents into pictures."""
    approximate: bool = False
    """Whether pictures may be approximate previews. Without it no ``AutoencoderTiny`` is served."""
    revision: str | None = None
    variant: str | None = None
    family: str | None = None
    device: str = "auto"
    dtype: str | None = None
    engine: str | None = None
    memory_limit: str | None = None
    cuda_graphs: bool | None = None
    keep_memory: bool | None = None
    max_pixels: int = 4096 * 4096
    """The largest number of pixels that all images of one request, or of one decode, may have together."""
    threads: int | None = None
    """How many CPU threads one instance computes with; None: as many as PyTorch chooses."""

    @classmethod
    def read(
        cls,
        parameters: Mapping[str, Mapping[str, str]],
        environ: Mapping[str, str],
        *,
        kind: str,
        device_id: str,
    ) -> Settings:
        """Read the settings from what Triton hands to ``initialize``.

        Args:
            parameters: ``model_config["parameters"]``. An empty value means the default.
            environ: the environment. Its FLUXVAE_DEVICE and FLUXVAE_MEMORY_LIMIT win over the file, and so do its
                FLUXVAE_CHECKPOINT and FLUXVAE_FAMILY, or what `_OWN_VARIABLES` has in their place.
            kind, device_id: Triton's ``model_instance_kind`` and ``model_instance_device_id``: an automatic device is
                the one that Triton gave to the instance.

        Raises:
            InvalidOptionError: a parameter is unknown, or its value cannot be read.
            CheckpointError: no checkpoint is set, and none ships for this model.
        """
        given = {
            name: value["string_value"].strip()
            for name, value in parameters.items()
            if not name.isupper()  # names in capitals are Triton's own, such as EXECUTION_ENV_PATH
        }
        if unknown := sorted(given.keys() - cls.__dataclass_fields__.keys()):
            raise InvalidOptionError(
                f"config.pbtxt: unknown parameter {unknown[0]!r}, expected one of {', '.join(cls.__dataclass_fields__)}"
            )
        first = given.get("vae_class", "").partition(",")[0]
        own = _OWN_VARIABLES.get(first, "FLUXVAE_")
        variables = {"checkpoint": f"{own}CHECKPOINT", "family": f"{own}FAMILY", **_ENVIRONMENT}
        given |= {name: environ[variable] for name, variable in variables.items() if environ.get(variable)}
        values: dict[str, Any] = {name: text for name, text in given.items() if text}
        if first in _OWN_VARIABLES and "checkpoint" not in values:
            raise CheckpointError(
                f"checkpoint: none is set, and none for {first} ships; set the parameter checkpoint in "
                f"config.pbtxt or {variables['checkpoint']}, or serve other models only: from a model "
                "repository that does not hold this one"
            )
        for name in ("approximate", "encodes", "cuda_graphs", "keep_memory"):
            if name in values:
                values[name] = _flag(name, values[name])
        for name in ("max_pixels", "threads"):
            if name in values:
                values[name] = _positive(name, values[name])
        if kind == "GPU" and values.get("device", "auto") in ("auto", "cuda"):
            values["device"] = f"cuda:{device_id}"
        elif kind == "CPU" and values.get("device", "auto") == "auto":
            values["device"] = "cpu"
        return cls(**values)

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments for ``from_pretrained``: the settings that are set."""
        names = (
            "revision", "variant", "family", "device", "dtype", "engine", "memory_limit", "cuda_graphs", "keep_memory",
        )  # fmt: skip
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def check(self, half: Decoder | Encoder) -> None:
        """Check that the checkpoint which was loaded is one that this model may serve.

        Raises:
            CheckpointError: the checkpoint is of a class that ``vae_class`` does not name.
            InvalidOptionError: it is a preview's, and ``approximate`` is not set or the model encodes.
        """
        found = type(half.vae).__name__
        classes = [] if self.vae_class is None else [name.strip() for name in self.vae_class.split(",")]
        if classes and found not in classes:
            served = model_for(found, encodes=self.encodes)
            raise CheckpointError(
                f"checkpoint: {self.checkpoint} is {found}, expected {' or '.join(classes)} for this model"
                + (f"; serve it as {served}" if served else "")
            )
        if half.approximate and self.encodes:
            raise InvalidOptionError(
                f"encodes: got true, but {self.checkpoint} is {found}, whose latents are approximate, and an answer "
                "has no place to say so; serve the full VAE"
            )
        if half.approximate and not self.approximate:
            raise InvalidOptionError(
                f"approximate: got false, but {self.checkpoint} is {found}, whose pictures are approximate; set the "
                "parameter approximate to true, or serve the full VAE"
            )


def make_work(settings: Settings) -> Work:
    """Load the half of the checkpoint that the model needs, and return the work that it does.

    Raises:
        FluxVAEError: the checkpoint cannot be loaded, or is none that this model may serve.
    """
    kind: type[Decoder | Encoder] = Encoder if settings.encodes else Decoder
    half = kind.from_pretrained(settings.checkpoint, **settings.options())
    settings.check(half)
    if isinstance(half, Encoder):
        ignore_warnings()  # of pictures; this process does nothing else
        return Encoding(half, settings.max_pixels)
    return Decoding(half, settings.max_pixels)


def _flag(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise InvalidOptionError(f"config.pbtxt: {name}: got {text!r}, expected true or false")
    return text == "true"


def _positive(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise InvalidOptionError(f"config.pbtxt: {name}: got {text!r}, expected a whole number above 0")
    return int(text)


def check_tensor_exchange(pb_utils: Any) -> None:
    """Refuse to serve where Triton's Python stub and this NumPy corrupt each other's tensors.

    Before Triton 24.11 the stub takes 0 for the size of NumPy 2's items, without an error: every value that is read is
    the first one, and outputs are sent without bytes. DLPack does not use NumPy, so each direction is compared with it.
    That bytes are missing from an output can be seen only outside this process, but the same cause shows in what is
    read.

    Args:
        pb_utils: the module ``triton_python_backend_utils``.

    Raises:
        FluxVAEError: a tensor came back changed.
    """
    sent = [1.0, 2.0, 3.0]
    into = pb_utils.Tensor.from_dlpack("into", torch.tensor(sent, dtype=torch.float32, device="cpu")).as_numpy()
    out_of = torch.utils.dlpack.from_dlpack(pb_utils.Tensor("out_of", np.array(sent, dtype=np.float32)).to_dlpack())
    for direction, came in (("read", np.asarray(into).tolist()), ("sent", out_of.tolist())):
        if came != sent:
            raise FluxVAEError(
                f"Triton's Python stub and NumPy {np.__version__} corrupt tensors: {direction} {sent}, got {came}. "
                "Refusing to serve wrong images; install 'numpy<2' in this environment, or use Triton 24.11 or later"
            )


def warm_up(work: Work) -> None:
    """Decode or encode a small image and make every output of it.

    This compiles the kernels and proves that requests can be answered. It is done while the model loads, so that Triton
    says that it is ready only afterwards.

    Raises:
        FluxVAEError: it failed, for instance because the weights give NaN, or because the memory limit is too small for
            any image. Other errors, such as out of memory, are passed on.
    """
    job = work.tiny()
    made = work.make_outputs(job, work.compute([job], lambda: False))
    if made.keys() != job.outputs or any(len(array) != 1 for array in made.values()):
        size = f"{job.request.height}x{job.request.width}"
        raise FluxVAEError(f"warm-up: an image of {size} pixels gave {sorted(made)}, expected {sorted(job.outputs)}")
