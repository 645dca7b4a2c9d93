"""A server on this machine is asked directly, whatever the environment says of proxies."""

from __future__ import annotations

import pytest

from fastserve.host.http_client import is_loopback, open_client
from fastserve.settings.option import ConfigError
from tests.verbs.test_top import server_that_says


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "nonsense", "socks5://127.0.0.1:9"])
@pytest.mark.parametrize("variable", ["http_proxy", "ALL_PROXY"])
def test_a_proxy_never_stands_before_loopback(monkeypatch, variable, proxy):
    """A dead, malformed or unsupported proxy does not keep a local server from being asked."""
    monkeypatch.setenv(variable, proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    with server_that_says("here") as url, open_client(url, timeout_s=5.0) as client:
        assert client.get(url).text == "here"


def test_a_proxy_of_the_environment_that_cannot_be_used_is_one_line(monkeypatch):
    """Only where it would be used: the same address is fine for a direct client."""
    monkeypatch.setenv("ALL_PROXY", "nonsense://x")
    with pytest.raises(ConfigError, match="proxy") as refused:
        open_client("http://192.0.2.1", timeout_s=1.0)
    assert "\n" not in str(refused.value)
    open_client("http://192.0.2.1", timeout_s=1.0, is_direct=True).close()


@pytest.mark.parametrize("url", ["", "nowhere", "http://", "http://[::1", "http:///path"])
def test_what_is_no_address_is_refused(url):
    """Before anything is asked."""
    with pytest.raises(ConfigError, match="not the address of a server"):
        open_client(url, timeout_s=1.0)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("LOCALHOST.", True),
        ("gpu.localhost", True),
        ("192.0.2.1", False),
        ("localhost.example.org", False),
        ("example.org", False),
    ],
)
def test_which_hosts_are_this_machine(host, expected):
    """Names and addresses, IPv6 among them."""
    assert is_loopback(host) is expected
