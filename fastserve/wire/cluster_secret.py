"""The secret that the hosts of one server share, and what proves that a host knows it.

Rules: it comes from a file or from the environment, never from a command line, which every user of
a host can read. It is never sent, logged or shown: a proof is an HMAC-SHA256 of what both ends drew
for this connection alone. Must not know: sockets, what is proved to whom.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from fastserve.settings.option import ConfigError

VARIABLE = "FASTSERVE_CLUSTER_SECRET"
MIN_BYTES = 16  # whoever saw a proof could try all shorter ones
PROOF_BYTES = hashlib.sha256().digest_size


class ClusterSecret:
    """A secret of at least MIN_BYTES bytes."""

    def __init__(self, value: bytes, source: str = "the cluster secret") -> None:
        if len(value) < MIN_BYTES:
            raise ConfigError(f"{source}: {len(value)} bytes; a secret has {MIN_BYTES} at least")
        self._value = value

    @classmethod
    def read(cls, path: str | None) -> ClusterSecret | None:
        """Return the secret in a file, else that of the environment; None where neither is given.

        Blanks and line ends around it do not count. Raises ConfigError for a file that cannot be
        read and for a secret that is too short.
        """
        if path is not None:
            try:
                return cls(Path(path).read_bytes().strip(), f"--cluster-secret-file {path}")
            except OSError as error:
                raise ConfigError(f"--cluster-secret-file {path}: {error.strerror}") from error
        value = os.environb.get(VARIABLE.encode(), b"").strip()
        return cls(value, VARIABLE) if value else None

    @classmethod
    def draw(cls) -> ClusterSecret:
        """Return a new one."""
        return cls(secrets.token_hex(32).encode())

    def reveal(self) -> str:
        """Return it as the text of an environment variable, for a process that is to have it."""
        return os.fsdecode(self._value)

    def prove(self, role: bytes, drawn: bytes) -> bytes:
        """Return what only who knows the secret can say, in this role, of what was drawn."""
        return hmac.digest(self._value, role + b"\0" + drawn, hashlib.sha256)

    def is_proved(self, proof: bytes, role: bytes, drawn: bytes) -> bool:
        """Whether a proof is that of this role, in a time that tells nothing."""
        return hmac.compare_digest(proof, self.prove(role, drawn))
