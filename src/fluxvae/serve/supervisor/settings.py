"""What `fluxvae serve` can be told, and what it makes of that for Triton's models and for the gateway."""

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
    "FLUXVAE_PREVIEW_CHECKPOINT",
    "FLUXVAE_FAMILY",
    "FLUXVAE_FLUX2_FAMILY",
    "FLUXVAE_PREVIEW_FAMILY",
    "FLUXVAE_DEVICE",
    "FLUXVAE_MEMORY_LIMIT",
    "FLUXVAE_TOKEN",
)


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Of one Triton server and one gateway.

    Raises:
        InvalidOptionError: a number that must be above 0, an empty token, a revision, variant or family for several
            models, a memory limit that cannot be read, is of no model served, or leaves nothing for another.
        CheckpointError: a checkpoint that looks like a path where there is nothing.
    """

    host: str = "127.0.0.1"
    """What the gateway binds to."""
    port: int = 8080
    """Of the gateway; each port may be 0: a free one."""
    triton_host: str = "127.0.0.1"
    """What Triton's own endpoints bind to. They ask for no token."""
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    allow_client_shm: bool = False
    """Clients on this machine may have Triton read and write shared memory of theirs."""
    models: Mapping[str, str] = field(default_factory=lambda: {MODEL: "demo"})
    """Checkpoint by name, of `fluxvae.serve.models.MODELS`; the first is the one the gateway's page decodes with."""
    revision: str | None = None
    variant: str | None = None
    family: str | None = None
    """Whose VAE a single file holds, as for `Decoder.from_pretrained`."""
    device: str = "auto"
    dtype: str | None = None
    engine: str | None = None
    """Of the full VAEs; a preview has one of its own."""
    memory_limit: str | None = None
    """Of all models on a device together: what `model_memory_limits` leaves is shared equally among the others."""
    model_memory_limits: Mapping[str, str] = field(default_factory=dict)
    """Of single models, by name; together no more than ``memory_limit``, where there is one."""
    max_pixels: int = 4096 * 4096
    """Of one request, its batch counted."""
    threads: int | None = None
    """CPU threads of one instance; None: PyTorch's choice."""
    token: str | None = field(default=None, repr=False)
    """What clients of the gateway must send."""
    max_request_bytes: int | None = None
    """Of one request to the gateway; None: its own default."""
    max_queue: int | None = None
    """Requests that may wait in the gateway; None: its own default."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that requests may call the gateway by, besides loopback's."""
    request_timeout_s: float = 300.0
    """From a request's arrival at the gateway to its answer."""
    log_file: str | Path | None = None
    """Both logs are appended to it; None: kept until the server stops."""
    ready_timeout_s: float = 300.0
    """For loading the checkpoint and a first decode."""
    drain_s: float = 30.0
    """For what is under way when the server is told to stop."""
    patience_s: float = 30.0
    """Triton neither answers nor computes for this long: hung."""
    busy_limit_s: float = 3600.0
    """No decode is answered for this long, although it computes: hung."""

    def __post_init__(self) -> None:
        names = ("max_pixels", "threads", "max_request_bytes", "request_timeout_s", "ready_timeout_s")
        check_positive(**{name: getattr(self, name) for name in (*names, "drain_s", "patience_s", "busy_limit_s")})
        if self.patience_s < LEAST_PATIENCE_S:
            raise InvalidOptionError(
                f"patience_s: got {self.patience_s:g}, expected at least {LEAST_PATIENCE_S:g}: a tiny decode is asked "
                "for every 2 s only, and a machine with much else to do may take seconds for it"
            )
        if self.token is not None and not self.token.strip():
            raise InvalidOptionError("token: got an empty one; expected a secret, or none at all")
        for name in ("revision", "variant", "family"):
            if getattr(self, name) is not None and len(self.models) > 1:
                raise InvalidOptionError(
                    f"--{name}: got {getattr(self, name)!r} for {len(self.models)} models, "
                    f"{' and '.join(self.models)}; expected one model: download the others and pass their folders"
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
        """Who can reach this server: warnings.

        Raises:
            TritonServerError: the wheel's Triton, which has known security holes, beyond this machine.
        """
        warnings = []
        if not is_loopback(self.triton_host):
            if installation.wheel is not None:
                raise TritonServerError(
                    f"--triton-host: got {self.triton_host}, but this is the nvidia-pytriton wheel's Triton, which has "
                    "known security holes: it stays on 127.0.0.1. Open the gateway with --host, or run in NVIDIA's "
                    "Triton container"
                )
            warnings.append(f"Triton's own endpoints on {self.triton_host} ask for no token: anyone may decode there")
        if not is_loopback(self.host) and self.token is None:
            warnings.append(f"the gateway on {self.host} asks for no token: anyone may decode. Set FLUXVAE_TOKEN")
        return warnings

    def check_memory(self) -> list[str]:
        """Whether several models may want the same memory: warnings."""
        without = [name for name, limit in self._memory_limits().items() if limit is None]
        if len(self.models) == 1 or not without:
            return []
        return [
            f"{len(self.models)} models, and no limit for {', '.join(without)}: what has none plans with what is free "
            "when its decode begins, so that decodes at the same time may run out of memory; --memory-limit is shared "
            "out among the models"
        ]

    def _memory_limits(self) -> dict[str, str | None]:
        """By model; None: what is free. On each device they add up to ``memory_limit`` at most.

        Every model has one instance on each device.
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
        """For the ``parameters`` of a model's ``config.pbtxt``, an empty text is the default."""
        checkpoint = self.models[model]
        path = Path(checkpoint).expanduser()
        values = {
            "checkpoint": str(path.resolve()) if checkpoint != "demo" and path.exists() else checkpoint,
            "revision": self.revision,
            "variant": self.variant,
            "family": self.family,
            "device": None if self.device == "auto" else self.device,
            "dtype": self.dtype,
            "engine": None if MODELS[model] == "AutoencoderTiny" else self.engine,
            "memory_limit": self._memory_limits()[model],
            "max_pixels": self.max_pixels,
            "threads": self.threads,
        }
        return {name: "" if value is None else str(value) for name, value in values.items()}

    def without_our_variables(self) -> dict[str, str]:
        """Environment for Triton: its config file must not be overruled, and the token is not its business."""
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
        if self.max_queue is not None:
            command += ["--max-queue", str(self.max_queue)]
        for host in self.allowed_hosts:
            command += ["--allowed-host", host]
        return command
