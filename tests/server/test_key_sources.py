"""Where keys come from: flags, a file, the environment; all of them hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve import cli
from fastserve.server.key_sources import read_keys
from fastserve.settings.option import ConfigError
from fastserve.settings.server import KEY_VARIABLE, ServerConfig


def test_all_sources_hold_together(tmp_path: Path) -> None:
    """Each key once, the flags' first."""
    file = tmp_path / "keys"
    file.write_text("\n  k3\nk1\n\nk4 \n")
    config = ServerConfig(api_key=("k1", "k2"), api_key_file=str(file))
    assert read_keys(config, {KEY_VARIABLE: "k5\n k2"}) == ("k1", "k2", "k3", "k4", "k5")
    assert read_keys(ServerConfig(), {}) == ()


@pytest.mark.parametrize("content", [b"", b" \n\n", "clé".encode(), b"\xff\xfe", b"a\tb"])
def test_a_file_that_opens_the_server_to_all_is_refused(tmp_path: Path, content: bytes) -> None:
    """In one line that names it and repeats no key."""
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^--api-key-file {file}: [^\n]+$") as caught:
        read_keys(ServerConfig(api_key_file=str(file)), {})
    assert "cl" not in str(caught.value).removeprefix(f"--api-key-file {file}")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """It was meant to close the server."""
    with pytest.raises(ConfigError, match="No such file"):
        read_keys(ServerConfig(api_key_file=str(tmp_path / "none")), {})


@pytest.mark.parametrize("value", ["", "  ", "clé"])
def test_a_variable_that_opens_the_server_to_all_is_refused(value: str) -> None:
    """An unset one in a script, for instance."""
    with pytest.raises(ConfigError, match=f"^{KEY_VARIABLE}: "):
        read_keys(ServerConfig(), {KEY_VARIABLE: value})


def test_serve_refuses_it_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As every other setting that cannot be honoured."""
    monkeypatch.setenv(KEY_VARIABLE, "")
    assert cli.main(["serve", "demo", "--port", "0"]) == 2
    line = f"fastserve: error: {KEY_VARIABLE}: there is no key in it\n"
    assert capsys.readouterr().err.endswith(line)
