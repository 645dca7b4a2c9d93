"""The keys of a server, from all places that may hold them: flags, a file, the environment.

Rules: all of them hold together; a source that is named and has none is a ConfigError, for the
server would be open to all. No message repeats a key. Must not know: how keys are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastserve.settings.option import ConfigError
from fastserve.settings.server import KEY_VARIABLE, ServerConfig, check_keys


def read_keys(config: ServerConfig, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return every key once; ConfigError for a source that cannot be used."""
    keys = list(config.api_key)
    if config.api_key_file is not None:
        keys += _keys_in(config.api_key_file)
    if KEY_VARIABLE in environment:
        keys += _used(environment[KEY_VARIABLE].split(), KEY_VARIABLE)
    return tuple(dict.fromkeys(keys))


def _keys_in(path: str) -> list[str]:
    source = f"--api-key-file {path}"
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8 text") from error
    return _used([line.strip() for line in lines if line.strip()], source)


def _used(keys: list[str], source: str) -> list[str]:
    if not keys:
        raise ConfigError(f"{source}: there is no key in it")
    check_keys(keys, source)
    return keys
