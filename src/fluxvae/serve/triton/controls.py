"""Who may use Triton's endpoints for more than decoding: nobody, unless told otherwise.

Triton guards groups of its endpoints by a header of one's choice (``--http-restricted-api``,
``--grpc-restricted-protocol``). Its command line, with that header, can be read by every user of the machine
(``/proc/PID/cmdline``), so a secret alone would keep out the network but not the neighbours. What nobody needs is
therefore closed by a value that no header can carry: it ends in a line feed. The one group that the gateway asks for,
the configuration of models, is opened by a secret of its own; it lets nobody change anything.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from fluxvae.errors import InvalidOptionError

__all__ = ["APIS", "CONFIG_HEADER", "CONFIG_KEY_VARIABLE", "restrictions"]

APIS = ("shared-memory", "model-config", "model-repository", "statistics", "trace", "logging")
"""Triton's groups of endpoints beside inference, health and metadata, which are open."""
CONFIG_HEADER = "fluxvae-config-key"
"""Carries the key for ``model-config``; over gRPC after ``triton-grpc-protocol-``."""
CONFIG_KEY_VARIABLE = "FLUXVAE_TRITON_CONFIG_KEY"
"""Environment variable with that key, for the gateway."""
_CLOSED_HEADER = "fluxvae-closed"


def restrictions(open_apis: Sequence[str], config_key: str) -> list[str]:
    """Arguments for ``tritonserver``.

    Args:
        open_apis: groups of `APIS` that anyone may use.
        config_key: opens ``model-config``.

    Raises:
        InvalidOptionError: a group that is not among `APIS`.
    """
    for name in open_apis:
        if name not in APIS:
            raise InvalidOptionError(f"open_apis: got {name!r}, expected one of {', '.join(APIS)}")
    closed = [name for name in APIS if name not in open_apis]
    rules = []
    if "model-config" in closed:
        closed.remove("model-config")
        rules.append(f"model-config:{CONFIG_HEADER}={config_key}")
    if closed:
        rules.append(f"{','.join(closed)}:{_CLOSED_HEADER}={secrets.token_hex(16)}\n")
    flags = ("--http-restricted-api", "--grpc-restricted-protocol")
    return [f"{flag}={rule}" for flag in flags for rule in rules]
