"""The settings of `fluxvae serve`, and what Triton's models and the gateway are told because of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fluxvae.checkpoints.files import SUFFIXES
from fluxvae.engine.plan import parse_memory_limit
from fluxvae.errors import CheckpointError, InvalidOptionError
from fluxvae.serve.gateway.hosts import read_allowed_host
from fluxvae.serve.models import MODEL, MODELS
from fluxvae.serve.supervisor.checks import check_positive, is_loopback
from fluxvae.serve.triton.installation import Installation, TritonServerError

__all__ = ["ServeSettings"]

LEAST_PATIENCE_S = 5.0
_OUR_VARIABLES = (
    "FLUXVAE_CHECKPOINT",
    "FLUXVAE_FLUX2_CHECKPOINT",
    "FLUXVAE_QWEN_IMAGE_CHECKPOINT",
    "FLUXVAE_PREVIEW_CHECKPOINT",
    "FLUXVAE_FAMILY",
    "FLUXVAE_FLUX2_FAMILY",
    "FLUXVAE_QWEN_IMAGE_FAMILY",
    "FLUXVAE_PREVIEW_FAMILY",
    "FLUXVAE_DEVICE",
    "FLUXVAE_MEMORY_LIMIT",
    "FLUXVAE_TOKEN",
)


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """The settings of one Triton server and one gateway, checked when they are made.

    Raises:
        InvalidOptionError: a number is not above 0 and must be; the token is empty; a revision, variant or family is
            given for several checkpoints; or a memory limit cannot be read, is for a model that is not served, or
            leaves nothing for another model.
        CheckpointError: a checkpoint looks like a path, and there is nothing at that path.
    """

    host: str = "127.0.0.1"
    """The address that the gateway binds to."""
    port: int = 8080
    """The gateway's port. This port, and each of Triton's, may be 0, which picks a free one."""
    triton_host: str = "127.0.0.1"
    """The address that Triton's own endpoints bind to. They ask for no token."""
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    allow_client_shm: bool = False
    """Whether clients on this machine may have Triton read and write shared memory of theirs."""
    models: Mapping[str, str] = field(default_factory=lambda: {MODEL: "demo"})
    """The checkpoint of each model by the model's name, which is one of `fluxvae.serve.models.MODELS`. The gateway's
    page uses the first that decodes, and the first that encodes."""
    revision: str | None = None
    variant: str | None = None
    family: str | None = None
    """Whose VAE a single file holds, as for `Decoder.from_pretrained`."""
    device: str = "auto"
    dtype: str | None = None
    engine: str | None = None
    """The engine of the full VAEs. A preview always has its own engine."""
    memory_limit: str | None = None
    """The limit of all models on a device together. What `model_memory_limits` leaves of it is shared equally among the
    models that have no limit of their own."""
    model_memory_limits: Mapping[str, str] = field(default_factory=dict)
    """The limits of single models by name. Together they are no more than ``memory_limit``, where there is one."""
    max_pixels: int = 4096 * 4096
    """The most pixels that one request may have, all images of its batch together."""
    threads: int | None = None
    """The CPU threads of one instance of a model; None leaves the choice to PyTorch."""
    token: str | None = field(default=None, repr=False)
    """The secret that clients of the gateway must send; None: the gateway asks for none."""
    max_request_bytes: int | None = None
    """The largest request, in bytes, that the gateway takes; None: the gateway's own default."""
    max_picture_bytes: int | None = None
    """The largest body, in bytes, of a request to encode; None: the gateway's own default."""
    max_queue: int | None = None
    """How many requests may wait in the gateway; None: the gateway's own default."""
    allowed_hosts: tuple[str, ...] = ()
    """The names that requests may call the gateway by, besides those of loopback."""
    request_timeout_s: float = 300.0
    """How long a request may take from its arrival at the gateway to its answer."""
    log_file: str | Path | None = None
    """The file to which both logs are appended. None: each has a file of its own, which goes when the server stops."""
    ready_timeout_s: float = 300.0
    """How long loading the checkpoints and a first decode may take."""
    drain_s: float = 30.0
    """How long requests that are under way get to finish when the server is told to stop."""
    patience_s: float = 30.0
    """For how long Triton may neither answer nor compute before it counts as hung."""
    busy_limit_s: float = 3600.0
    """For how long Triton may leave every request unanswered before it counts as hung, although it computes."""

    def __post_init__(self) -> None:
        sizes = ("max_pixels", "threads", "max_request_bytes", "max_picture_bytes")
        times = ("request_timeout_s", "ready_timeout_s", "drain_s", "patience_s", "busy_limit_s")
        check_positive(**{name: getattr(self, name) for name in (*sizes, *times)})
        if self.patience_s < LEAST_PATIENCE_S:
            raise InvalidOptionError(
                f"patience_s: got {self.patience_s:g}, expected at least {LEAST_PATIENCE_S:g}: a tiny decode is asked "
                "for every 2 s only, and a machine with much else to do may take seconds for it"
            )
        if self.token is not None and not self.token.strip():
            raise InvalidOptionError("token: got an empty one; expected a secret, or none at all")
        for name in ("revision", "variant", "family"):
            if getattr(self, name) is not None and len(set(self.models.values())) > 1:
                raise InvalidOptionError(
                    f"--{name}: got {getattr(self, name)!r} for the checkpoints of {len(self.models)} models, "
                    f"{' and '.join(self.models)}; expected one checkpoint: download the others and pass their folders"
                )
        self._memory_limits()
        if self.max_queue is not None and self.max_queue < 0:
            raise InvalidOptionError(f"max_queue: got {self.max_queue}, expected 0 or more")
        for host in self.allowed_hosts:
            read_allowed_host(host)
        for checkpoint in self.models.values():
            looks_local = checkpoint.startswith((".", "/", "~")) or Path(checkpoint).suffix in SUFFIXES
            if looks_local and not Path(checkpoint).expanduser().exists():
                raise CheckpointError(
                    f"checkpoint: nothing at {checkpoint}; expected 'demo', a diffusers VAE folder, a pipeline folder "
                    "with vae/, a file such as ae.safetensors, or a hub id such as black-forest-labs/FLUX.1-schnell"
                )

    def check_exposure(self, installation: Installation) -> list[str]:
        """Return warnings about who can reach this server and decode with it.

        Raises:
            TritonServerError: Triton could be reached from other machines, and it is the nvidia-pytriton wheel's, which
                has known security holes.
        """
        warnings = []
        if not is_loopback(self.triton_host):
            if installation.wheel is not None:
                raise TritonServerError(
                    f"--triton-host: got {self.triton_host}, but this is the nvidia-pytriton wheel's Triton, which has "
                    "known security holes: it stays on 127.0.0.1. Open the gateway with --host, or run in NVIDIA's "
                    "Triton container"
                )
            warnings.append(f"Triton's own endpoints on {self.triton_host} ask for no token: anyone may use them")
        if not is_loopback(self.host) and self.token is None:
            warnings.append(f"the gateway on {self.host} asks for no token: anyone may use it. Set FLUXVAE_TOKEN")
        return warnings

    def check_memory(self) -> list[str]:
        """Return a warning where several models may want the same memory at the same time."""
        without = [name for name, limit in self._memory_limits().items() if limit is None]
        if len(self.models) == 1 or not without:
            return []
        return [
            f"{len(self.models)} models, and no limit for {', '.join(without)}: a model without one plans with the "
            "memory that is free when its decode begins, so that decodes at the same time may run out of memory; "
            "--memory-limit sets a limit that is shared out among the models"
        ]

    def _memory_limits(self) -> dict[str, str | None]:
        """Return the memory limit of each model; None for a model that may use what is free.

        Every model has one instance on each device, so the limits on a device add up to ``memory_limit`` at most.
        """
        option, own = "--model-memory-limit", self.model_memory_limits
        taken = 0
        for name, size in own.items():
            if name not in self.models:
                raise InvalidOptionError(
                    f"{option}: got {name}={size}, but {name} is not served; expected one of {', '.join(self.models)}"
                )
            try:
                taken += parse_memory_limit(size)
            except InvalidOptionError as error:
                raise InvalidOptionError(f"{option}: {name}: {error}") from error
        others = [name for name in self.models if name not in own]
        share = self.memory_limit
        if share is not None:
            left = parse_memory_limit(share) - taken
            if own and left < len(others):
                given = " and ".join(f"{name}={size}" for name, size in own.items())
                what = f"which leaves nothing for {', '.join(others)}" if left >= 0 else "which is more"
                raise InvalidOptionError(
                    f"{option}: got {given} of --memory-limit {share}, {what}; the limits of all models add up to it "
                    "at most"
                )
            if own or len(others) > 1:
                share = str(left // len(others)) if others else None
        return {name: own.get(name, share) for name in self.models}

    def model_parameters(self, model: str) -> dict[str, str]:
        """Return the values for the ``parameters`` of a model's ``config.pbtxt``. An empty text means the default."""
        checkpoint = self.models[model]
        path = Path(checkpoint).expanduser()
        values = {
            "checkpoint": str(path.resolve()) if checkpoint != "demo" and path.exists() else checkpoint,
            "revision": self.revision,
            "variant": self.variant,
            "family": self.family,
            "device": None if self.device == "auto" else self.device,
            "dtype": self.dtype,
            "engine": None if MODELS[model].vae_class == "AutoencoderTiny" else self.engine,
            "memory_limit": self._memory_limits()[model],
            "max_pixels": self.max_pixels,
            "threads": self.threads,
        }
        return {name: "" if value is None else str(value) for name, value in values.items()}

    def without_our_variables(self) -> dict[str, str]:
        """Return variables for Triton's environment that blank our own, FLUXVAE_CHECKPOINT and the like.

        The models would otherwise let these variables overrule their ``config.pbtxt``, and Triton has no business with
        the gateway's token.
        """
        return dict.fromkeys(_OUR_VARIABLES, "")

    def gateway_command(self, port: int, triton_grpc_url: str, triton_metrics_url: str) -> list[str]:
        """The gateway's command line. The token is not on it: every user of the machine could read it."""
        command = [sys.executable, "-m", "fluxvae.serve.gateway", "--triton", triton_grpc_url]
        command += ["--metrics", triton_metrics_url, "--host", self.host, "--port", str(port)]
        command += ["--max-pixels", str(self.max_pixels), "--timeout", str(self.request_timeout_s)]
        command += ["--drain", str(max(1, int(self.drain_s)))]
        for model in self.models:
            command += ["--model", model]
        if self.max_request_bytes is not None:
            command += ["--max-request-bytes", str(self.max_request_bytes)]
        if self.max_picture_bytes is not None:
            command += ["--max-picture-bytes", str(self.max_picture_bytes)]
        if self.max_queue is not None:
            command += ["--max-queue", str(self.max_queue)]
        for host in self.allowed_hosts:
            command += ["--allowed-host", host]
        return command
