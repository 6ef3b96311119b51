"""What `fluxvae serve` can be told, and what it makes of that for Triton's model and for the gateway."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from fluxvae.errors import CheckpointError, InvalidOptionError
from fluxvae.serve.supervisor.checks import check_positive, is_loopback
from fluxvae.serve.triton.installation import Installation, TritonServerError

__all__ = ["ServeSettings"]

LEAST_PATIENCE_S = 5.0
_OUR_VARIABLES = ("FLUXVAE_CHECKPOINT", "FLUXVAE_DEVICE", "FLUXVAE_MEMORY_LIMIT", "FLUXVAE_TOKEN")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Of one Triton server and one gateway.

    Raises:
        InvalidOptionError: a number that must be above 0, an empty token.
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
    checkpoint: str = "demo"
    revision: str | None = None
    device: str = "auto"
    dtype: str | None = None
    engine: str | None = None
    memory_limit: str | None = None
    max_pixels: int = 4096 * 4096
    """Of one request, its batch counted."""
    threads: int | None = None
    """CPU threads of one instance; None: PyTorch's choice."""
    token: str | None = field(default=None, repr=False)
    """What clients of the gateway must send."""
    max_request_bytes: int | None = None
    """Of one request to the gateway; None: its own default."""
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
        looks_local = self.checkpoint.startswith((".", "/", "~")) or self.checkpoint.endswith(".safetensors")
        if looks_local and not Path(self.checkpoint).expanduser().exists():
            raise CheckpointError(
                f"checkpoint: nothing at {self.checkpoint}; expected 'demo', a diffusers VAE folder, a pipeline folder "
                "with vae/, a .safetensors file, or a hub id such as black-forest-labs/FLUX.1-schnell"
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

    def model_parameters(self) -> dict[str, str]:
        """For the ``parameters`` of ``config.pbtxt``: every one of them, an empty text is the default."""
        path = Path(self.checkpoint).expanduser()
        values = {
            "checkpoint": str(path.resolve()) if self.checkpoint != "demo" and path.exists() else self.checkpoint,
            "revision": self.revision,
            "device": None if self.device == "auto" else self.device,
            "dtype": self.dtype,
            "engine": self.engine,
            "memory_limit": self.memory_limit,
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
        if self.max_request_bytes is not None:
            command += ["--max-request-bytes", str(self.max_request_bytes)]
        return command
