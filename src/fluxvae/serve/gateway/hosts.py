"""Decides by which host names requests may call the gateway, and which web pages may send it something.

A web page can let its own host name point at 127.0.0.1 (DNS rebinding). A browser then takes the gateway for the page's
own server, and lets the page read the answers. What gives such a page away is the ``Host`` header of its requests: the
browser puts the page's host name there, and the page cannot change it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from fluxvae.errors import InvalidOptionError

__all__ = ["is_loopback", "may_call", "may_send", "read_allowed_host", "split_authority"]

_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:/@\s%]+)(?::(\d{1,5}))?")


def split_authority(authority: str) -> tuple[str, str] | None:
    """Split ``host[:port]`` into host and port.

    Returns:
        The host in lower case, without brackets and without a dot at its end; and the port, which is empty where there
        is none. None where the text is not of this form. Neither are texts with a zone (``[fe80::1%eth0]``), a user
        name or a space, which no browser sends.
    """
    found = _AUTHORITY.fullmatch(authority.lower())
    if found is None:
        return None
    host = found[1].strip("[]").removesuffix(".")
    return (host, found[2] or "") if host else None


def is_loopback(host: str) -> bool:
    """Return whether a host, as `split_authority` gives it, is this machine: 127.0.0.0/8, ::1, or localhost.

    Names that end in ``.localhost`` are this machine too: nobody can register one, so no stranger can point it
    anywhere. An address in another notation (2130706433, 0x7f.1) counts as a foreign name. That is no loss, because a
    browser turns it into 127.0.0.1 before it sends it.
    """
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def read_allowed_host(text: str) -> str:
    """Turn a value of ``--allowed-host`` into the form in which `may_call` compares hosts.

    Raises:
        InvalidOptionError: it is anything but one name or address without a port.
    """
    split = split_authority(f"[{text}]" if text.count(":") > 1 and not text.startswith("[") else text)
    if split is None or split[1] or "*" in text:
        raise InvalidOptionError(
            f"allowed_hosts: got {text[:80]!r}, expected one name or address without scheme and port, such as "
            "decoder.example.org"
        )
    return split[0]


def may_call(hosts: Sequence[str], allowed: frozenset[str]) -> bool:
    """Return whether a request with these ``Host`` headers calls the gateway by a name of its own.

    Such names are loopback's and those that are ``allowed``. A request without the header may call too: it comes from a
    program, because every browser sends one.
    """
    split = [split_authority(host) for host in hosts]
    return all(each is not None and (is_loopback(each[0]) or each[0] in allowed) for each in split)


def may_send(origins: Sequence[str], hosts: Sequence[str], allowed: frozenset[str]) -> bool:
    """Return whether a request with these ``Origin`` and ``Host`` headers may make the gateway work.

    It may if the page that sent it is the gateway's own, or of a host that is ``allowed``. Programs send no ``Origin``,
    and may too. The origin ``null``, which files and sandboxed frames have, is never that of the gateway's page.
    """
    own = {split_authority(host) for host in hosts} - {None}
    for origin in origins:
        split = split_authority(origin.partition("://")[2])
        if split is None or (split not in own and split[0] not in allowed):
            return False
    return True
