"""Who gets into the gateway: tokens in UTF-8, and the names and origins that requests come with."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxvae.errors import InvalidOptionError
from fluxvae.serve.gateway.app import GatewaySettings
from fluxvae.serve.gateway.hosts import is_loopback, may_call, read_allowed_host, split_authority
from fluxvae.serve.gateway.http import sent_token
from serve.gateways import Gateways, ask

TOKEN = "schlüssel-à-密码"
NONE: frozenset[str] = frozenset()


@pytest.fixture(scope="module")
def guarded(gateways: Gateways) -> str:
    return gateways.start(token=TOKEN)


@pytest.mark.parametrize("scheme", ["Bearer", "Basic"])
def test_a_token_beyond_ascii_is_taken_in_utf8(guarded: str, scheme: str) -> None:
    value = TOKEN.encode() if scheme == "Bearer" else base64.b64encode(f"any:{TOKEN}".encode())
    assert ask(guarded, path="/openapi.json", headers={"Authorization": scheme.encode() + b" " + value}).status == 200  # type: ignore[dict-item]
    wrong = TOKEN[:-1].encode() if scheme == "Bearer" else base64.b64encode(f"any:{TOKEN[:-1]}".encode())
    assert ask(guarded, path="/openapi.json", headers={"Authorization": scheme.encode() + b" " + wrong}).status == 401  # type: ignore[dict-item]


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zs"]), min_size=1))
def test_any_token_is_read_as_it_was_sent(token: str) -> None:
    assert sent_token(b"Bearer " + token.encode()) == token.encode()
    assert sent_token(b"Basic " + base64.b64encode(b"user:" + token.encode())) == token.encode()


OWN = [
    "127.0.0.1",
    "127.0.0.1:8080",
    "127.9.9.9",
    "localhost",
    "LOCALHOST:1",
    "localhost.",
    "a.localhost",
    "[::1]:8080",
]
FOREIGN = [
    "evil.example",
    "evil.example:8080",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "notlocalhost",
    "192.168.1.7",
    "[::2]",
    "[::1%25lo]",
    "2130706433",
    "0177.0.0.1",
    "user@localhost",
    "localhost evil.example",
    "",
]


@pytest.mark.parametrize("host", OWN)
def test_loopbacks_names_are_answered(gateway: str, host: str) -> None:
    assert ask(gateway, path="/healthz", headers={"Host": host}).status == 200


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_any_other_name_is_refused(gateway: str, host: str, method: str) -> None:
    answer = ask(gateway, method, "/", headers={"Host": host, "X-Forwarded-Host": "localhost"})
    assert answer.status == 421
    assert "--allowed-host" in json.loads(answer.body)["error"]


def test_allowed_hosts_and_tokens_open_other_names(gateways: Gateways, guarded: str) -> None:
    url = gateways.start(allowed_hosts=["Decoder.example"])
    assert ask(url, path="/healthz", headers={"Host": "decoder.EXAMPLE.:80"}).status == 200
    assert ask(url, path="/healthz", headers={"Host": "other.example"}).status == 421
    assert ask(guarded, path="/healthz", headers={"Host": "decoder.example"}).status == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://localhost"])
def test_a_page_of_another_origin_cannot_send(gateway: str, origin: str) -> None:
    assert ask(gateway, "POST", "/", headers={"Origin": origin, "Content-Type": "text/plain"}, body=b"").status == 403


def test_the_gateways_own_page_can_send(gateway: str) -> None:
    answer = ask(gateway, "POST", "/", headers={"Origin": gateway, "Content-Type": "tensor/binary"}, body=b"")
    assert answer.status == 400, answer.body  # it was let in, and refused only for its parameters


@pytest.mark.parametrize("host", ["*", "*.example", "http://a.example", "a.example:80", "", "a b"])
def test_allowed_hosts_that_are_no_name_are_refused(host: str) -> None:
    with pytest.raises(InvalidOptionError, match="allowed_hosts"):
        GatewaySettings(triton_grpc_url="127.0.0.1:1", allowed_hosts=[host])


def test_an_address_may_be_allowed() -> None:
    assert may_call(
        ["[fe80::1]:80", "10.0.0.1"], frozenset({read_allowed_host("fe80::1"), read_allowed_host("10.0.0.1")})
    )


def test_every_host_of_several_must_be_its_own() -> None:
    assert may_call([], NONE)
    assert may_call(["localhost", "127.0.0.1"], NONE)
    assert not may_call(["localhost", "evil.example"], NONE)


@given(st.ip_addresses())
def test_addresses_are_loopback_as_their_network_says(address: object) -> None:
    split = split_authority(f"[{address}]:80" if ":" in str(address) else f"{address}:80")
    assert split is not None
    assert is_loopback(split[0]) == (str(address).startswith("127.") or str(address) == "::1")
