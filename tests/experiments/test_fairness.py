"""The table of floods: what the document says is what was measured."""

from __future__ import annotations

import json

from experiments.fairness import ARMS, FLOODS, table_of
from fastserve.host.provenance import ROOT


def test_the_document_has_the_table_of_the_result() -> None:
    """Every flood under every arm, and nothing else."""
    result = json.loads((ROOT / "results" / "fairness.json").read_text(encoding="utf-8"))
    entries = result["figures"]["entries"]
    assert len(entries) == 1 + len(FLOODS) * len(ARMS)
    document = (ROOT / "docs" / "scheduling.md").read_text(encoding="utf-8")
    assert table_of(entries) in document
