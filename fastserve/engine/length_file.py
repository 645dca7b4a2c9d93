"""Keeps what a served model's answers taught the policy `learned`, from one engine to the next.

Rules: one JSON a model and replica in the user's cache directory, replaced as a whole, so that of
two servers the last to write wins and no reader sees half a file. It has client names in it: only
the user may read it. The engine's thread takes a snapshot, another one encodes and writes it. What
cannot be read is a cold start, what cannot be written is not kept: each is one line, and service
goes on.
Must not know: what was learned, what it is used for.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import re
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from fastserve.core.lengths import LengthModel
from fastserve.host.cache_dir import cache_dir
from fastserve.host.json_file import read_object
from fastserve.settings.option import ConfigError

logger = logging.getLogger(__name__)

INTERVAL_S = 60.0  # least time between two writes; what a killed engine loses
LAST_WRITE_S = 2.0  # that the end of an engine waits for a write under way


def length_path(model: str, identity: str, replica: int = 0) -> Path:
    """Return where the lengths of a model are kept; `model` is there for people."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", model).strip("-")[-40:]
    own = f"_replica{replica}" if replica else ""
    return cache_dir() / f"lengths_{name}_{_digest(identity)[:8]}{own}.json"


class LengthFile:
    """The file of one model, and the LengthModel that began with what was in it."""

    def __init__(
        self, path: Path, identity: str, now: float, begin_with: Path | None = None
    ) -> None:
        """Read the file; `identity` tells the model from all others, `now` is in seconds.

        Where there is no file yet, what is learned begins with another one, if that is there.
        """
        self._path = path
        self._identity = _digest(identity)
        self.model = self._read(path if begin_with is None or path.is_file() else begin_with)
        self._num_kept = self.model.num_ended
        self._tried_at = now
        self._has_failed = False
        self._writer: threading.Thread | None = None

    @property
    def due_at(self) -> float:
        """The time from which on `keep` has something to do; inf while nothing is new."""
        return math.inf if self.model.num_ended == self._num_kept else self._tried_at + INTERVAL_S

    def keep(self, now: float) -> None:
        """Have what was learned written, if it is due; returns at once."""
        if now < self.due_at:
            return
        self._tried_at = now
        if self._writer is None or not self._writer.is_alive():
            self._writer = threading.Thread(
                target=self._write, args=(self._snapshot(),), name="engine-lengths", daemon=True
            )
            self._writer.start()

    def close(self) -> None:
        """Write what is new; a file system that hangs is not waited for."""
        if self._writer is not None:
            self._writer.join(LAST_WRITE_S)
            if self._writer.is_alive():
                return
        if self.model.num_ended != self._num_kept:
            self._write(self._snapshot())

    def _read(self, path: Path) -> LengthModel:
        try:
            content = read_object(path) if path.is_file() else None
            if content is None:
                return LengthModel()
            if content["model"] != self._identity:
                raise ValueError("it is another model's")
            return LengthModel.restored(content["lengths"])
        except ConfigError as error:  # which names the file
            why = str(error)
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            why = f"{path}: cannot be used: {error!r}"
        logger.warning("answer lengths are learned from nothing: %s", why)
        return LengthModel()

    def _snapshot(self) -> dict[str, Any]:
        return {"model": self._identity, "lengths": self.model.state()}

    def _write(self, snapshot: Mapping[str, Any]) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _replace(self._path, msgspec.json.encode(snapshot))
        except OSError as error:
            if not self._has_failed:
                logger.warning("what was learned of answer lengths is not kept: %s", error)
            self._has_failed = True
            return
        self._has_failed = False
        self._num_kept = snapshot["lengths"]["num_ended"]


def _replace(path: Path, content: bytes) -> None:
    """Put a file in the place of another at once; only its owner may read it."""
    descriptor, partial = tempfile.mkstemp(".tmp", f"{path.stem}.", path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def _digest(identity: str) -> str:
    return hashlib.sha256(os.fsencode(identity)).hexdigest()
