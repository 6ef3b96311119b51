"""Which names a request may call the gateway by, and which pages may send it something: pure functions.

A page whose own name is made to point at 127.0.0.1 (DNS rebinding) is of the gateway's origin for a browser, and may
read its answers. What gives it away is the ``Host`` of its requests, which a page cannot choose.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from fluxvae.errors import InvalidOptionError

__all__ = ["is_loopback", "may_call", "may_send", "read_allowed_host", "split_authority"]

_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:/@\s%]+)(?::(\d{1,5}))?")


def split_authority(authority: str) -> tuple[str, str] | None:
    """``(host, port)`` of ``host[:port]``: in lower case, without brackets and a last dot; None where it is neither.

    A zone (``[fe80::1%eth0]``), user names and spaces are refused: no browser sends them.
    """
    found = _AUTHORITY.fullmatch(authority.lower())
    if found is None:
        return None
    host = found[1].strip("[]").removesuffix(".")
    return (host, found[2] or "") if host else None


def is_loopback(host: str) -> bool:
    """Whether a host, as `split_authority` gives it, is this machine: 127.0.0.0/8, ::1, localhost and names below it.

    ``.localhost`` cannot be registered, so no stranger can point it anywhere. Numbers written in another way
    (2130706433, 0x7f.1) are names here, and foreign ones: a browser turns them into 127.0.0.1 before it sends them.
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
    """A value of ``--allowed-host``, as `may_call` compares it.

    Raises:
        InvalidOptionError: anything but one name or address without a port.
    """
    split = split_authority(f"[{text}]" if text.count(":") > 1 and not text.startswith("[") else text)
    if split is None or split[1] or "*" in text:
        raise InvalidOptionError(
            f"allowed_hosts: got {text[:80]!r}, expected one name or address without scheme and port, such as "
            "decoder.example.org"
        )
    return split[0]


def may_call(hosts: Sequence[str], allowed: frozenset[str]) -> bool:
    """Whether requests with these ``Host`` headers are for this gateway: all are loopback's or ``allowed``.

    None at all is a program's, since every browser sends one.
    """
    split = [split_authority(host) for host in hosts]
    return all(each is not None and (is_loopback(each[0]) or each[0] in allowed) for each in split)


def may_send(origins: Sequence[str], hosts: Sequence[str], allowed: frozenset[str]) -> bool:
    """Whether a page of this ``Origin`` may cause work: it is the gateway's own, or of a host that is ``allowed``.

    Programs send no ``Origin``. ``null``, of files and sandboxed frames, is no page of ours.
    """
    own = {split_authority(host) for host in hosts} - {None}
    for origin in origins:
        split = split_authority(origin.partition("://")[2])
        if split is None or (split not in own and split[0] not in allowed):
            return False
    return True
