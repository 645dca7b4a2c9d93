"""Terms: what hosts must have in common, and what each may have as it likes."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastserve import __version__
from fastserve.checkpoint.locate import BUNDLED
from fastserve.settings.engine import EngineConfig
from fastserve.wire.handshake import differences
from fastserve.wire.terms import schema_digest, terms

CONFIG = EngineConfig(
    pipeline_parallel_size=2, nnodes=2, master_addr="10.0.0.1", cluster_secret_file="/a/secret"
)


def test_hosts_that_were_started_alike_agree(tmp_path: Path) -> None:
    """Where the model lies, which host it is and where its secret is kept do not count."""
    shutil.copytree(BUNDLED, tmp_path / "copy")
    other = dataclasses.replace(
        CONFIG, model=str(tmp_path / "copy"), node_rank=1, cluster_secret_file="/b/secret"
    )
    ours = terms(CONFIG, BUNDLED)
    assert not differences(terms(other, tmp_path / "copy"), ours)
    assert ours["version"] == __version__
    assert "secret" not in str(ours)


def test_every_other_setting_counts() -> None:
    """What differs is named by its flag."""
    other = dataclasses.replace(CONFIG, max_num_seqs=8)
    line = "--max-num-seqs is 8 there, None here"
    assert differences(terms(other, BUNDLED), terms(CONFIG, BUNDLED)) == line


def test_another_checkpoint_counts_and_random_weights_have_none(tmp_path: Path) -> None:
    """Weights are compared where they are read."""
    shutil.copytree(BUNDLED, tmp_path / "copy")
    with (tmp_path / "copy" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    line = differences(terms(CONFIG, tmp_path / "copy"), terms(CONFIG, BUNDLED))
    assert line.startswith("checkpoint is ")
    dummy = dataclasses.replace(CONFIG, load_format="dummy")
    assert terms(dummy, tmp_path / "copy") == terms(dummy, BUNDLED)


@pytest.mark.processes
def test_the_schema_is_the_same_in_every_process() -> None:
    """Nothing in its digest depends on where it is made."""
    command = "from fastserve.wire.terms import schema_digest; print(schema_digest())"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    made = subprocess.run(
        (sys.executable, "-c", command), env=environment, capture_output=True, check=True
    )
    assert made.stdout.decode().strip() == schema_digest()
