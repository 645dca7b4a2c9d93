"""What layouts come to, by the simulator: the script runs, and changes nothing in a hurry."""

from __future__ import annotations

import json
from pathlib import Path

from experiments import layouts
from experiments.harness import Lab


def test_a_quick_run_has_every_model(tmp_path: Path) -> None:
    """It writes figures, and leaves the document alone."""
    before = layouts.DOCUMENT.read_text(encoding="utf-8")
    layouts.run(Lab(is_quick=True, output=tmp_path, num_workers=1))
    written = json.loads((tmp_path / "layouts.json").read_text())
    models = {entry["model"] for entry in written["figures"]["entries"]}
    assert models == {model for model, _ in layouts.LAYOUTS}
    assert layouts.DOCUMENT.read_text(encoding="utf-8") == before
