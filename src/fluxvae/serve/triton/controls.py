"""Closes Triton's endpoints for anything but decoding, unless the caller opens some of them.

Triton can demand a header of one's choice for groups of its endpoints (``--http-restricted-api``,
``--grpc-restricted-protocol``). But the value of that header stands on Triton's command line, which every user of the
machine can read (``/proc/PID/cmdline``), so that a secret value would keep out the network but not other users of the
machine. The groups that nobody needs are therefore closed by a value that no header can carry: one that ends in a line
feed. Only the configuration of models is needed, by the gateway. It has a secret of its own, which other users of the
machine may read, but which lets nobody change anything.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from fluxvae.errors import InvalidOptionError

__all__ = ["APIS", "CONFIG_HEADER", "CONFIG_KEY_VARIABLE", "restrictions"]

APIS = ("shared-memory", "model-config", "model-repository", "statistics", "trace", "logging")
"""Triton's groups of endpoints, except inference, health and metadata, which are always open."""
CONFIG_HEADER = "fluxvae-config-key"
"""The header that carries the key for ``model-config``. Over gRPC its name begins with ``triton-grpc-protocol-``."""
CONFIG_KEY_VARIABLE = "FLUXVAE_TRITON_CONFIG_KEY"
"""The environment variable that hands this key to the gateway."""
_CLOSED_HEADER = "fluxvae-closed"


def restrictions(open_apis: Sequence[str], config_key: str) -> list[str]:
    """Return the arguments for ``tritonserver`` that close its endpoints.

    Args:
        open_apis: the groups of `APIS` that anyone may use.
        config_key: the key that opens ``model-config``.

    Raises:
        InvalidOptionError: a group is not among `APIS`.
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
