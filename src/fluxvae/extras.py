"""Says in one message which extra of the package is missing, where a part of fluxvae that needs one is used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fluxvae.errors import FluxVAEError, MissingExtraError, first_line

__all__ = ["needs"]


@contextlib.contextmanager
def needs(extra: str, user: str) -> Iterator[None]:
    """Import what an extra brings inside this context.

    Args:
        extra: the extra of the package, such as ``"serve"``.
        user: what needs it, which begins the message: ``"fluxvae.client"``, ``"--ray"``.

    Raises:
        MissingExtraError: an import failed. Its cause is the import's own error, which the message quotes.
        ImportError: what failed to be imported is a part of fluxvae itself, which no extra brings.
    """
    try:
        yield
    except FluxVAEError:
        raise
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "fluxvae":
            raise
        raise MissingExtraError(
            f"{user}: needs the extra {extra!r} ({first_line(error)}); pip install 'fluxvae[{extra}]'"
        ) from error
