"""Terms: what the hosts of one server must have in common, as names and values to be compared.

Rules: one word for a value, so that a refusal can show both; what is too long for that is a digest.
Hosts are started by the same command line, but for what is each one's own. Must not know: torch,
how terms are compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from pathlib import Path

import msgspec

from fastserve import __version__
from fastserve.checkpoint.digest import digest
from fastserve.settings.engine import EngineConfig
from fastserve.wire.rank_messages import Order, Report

OF_ONE_HOST = frozenset({"model", "tokenizer", "node_rank", "cluster_secret_file"})
"""Settings in which hosts may differ; of the model, what is in its files counts."""
SHOWN = 16  # hexadecimal digits of a digest: what a line can hold


def terms(config: EngineConfig, model_dir: Path) -> dict[str, str]:
    """Return what this host has, the most telling first.

    Raises ConfigError for a checkpoint that cannot be read.
    """
    flags = {
        "--" + spec.name.replace("_", "-"): str(getattr(config, spec.name))
        for spec in dataclasses.fields(config)
        if spec.name not in OF_ONE_HOST
    }
    return {
        "version": __version__,
        "torch": importlib.metadata.version("torch"),
        "checkpoint": digest(model_dir, has_weights=config.load_format != "dummy"),
        "plan schema": schema_digest(),
        **flags,
    }


def schema_digest() -> str:
    """Return a digest of all that driver and ranks can say to each other, field by field."""
    schema = msgspec.json.schema(Order | Report)
    return hashlib.sha256(json.dumps(schema).encode()).hexdigest()[:SHOWN]
