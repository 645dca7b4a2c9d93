"""Who may load torch, seen from outside: in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from graphlib import TopologicalSorter

import grimp
import pytest

TORCH_FREE = {
    "fastserve": "import fastserve",
    "public names": "from fastserve import EngineConfig, SamplingParams",
    "config": "import fastserve.settings.engine",
    "core": """
import importlib, pkgutil, fastserve.core
for module in pkgutil.walk_packages(fastserve.core.__path__, "fastserve.core."):
    importlib.import_module(module.name)
""",
    "engine": """
import importlib, pkgutil, fastserve.engine
for module in pkgutil.walk_packages(fastserve.engine.__path__, "fastserve.engine."):
    importlib.import_module(module.name)
""",
    "server": """
import importlib, pkgutil, fastserve.server
for module in pkgutil.walk_packages(fastserve.server.__path__, "fastserve.server."):
    importlib.import_module(module.name)
""",
    "tokenizer": "import fastserve.text.tokenizer, fastserve.text.text_stream",
    "launch": """
import importlib, pkgutil, fastserve.launch
for module in pkgutil.walk_packages(fastserve.launch.__path__, "fastserve.launch."):
    importlib.import_module(module.name)
""",
    "cli --help": """
import contextlib, fastserve.cli
with contextlib.suppress(SystemExit):
    fastserve.cli.main(["serve", "--help"])
""",
    "bench scheduler": """
import fastserve.cli
code = fastserve.cli.main(
    ["bench", "scheduler", "--waiting", "0", "--running", "1", "--steps", "10"]
)
assert code == 0
""",
    "bench offline": "import fastserve.bench.offline",  # open_engine settles things before torch
    "bench serve": "import fastserve.bench.serve",
    "top": "import fastserve.verbs.top",
    "sim": """
import importlib, pkgutil, fastserve.sim
for module in pkgutil.walk_packages(fastserve.sim.__path__, "fastserve.sim."):
    importlib.import_module(module.name)
""",
    "simulate": """
import pathlib, tempfile, fastserve.cli
with tempfile.TemporaryDirectory() as folder:
    trace = pathlib.Path(folder) / "trace.csv"
    trace.write_text("arrived_at,prompt_tokens,output_tokens\\n0,9,3\\n")
    code = fastserve.cli.main(
        ["simulate", "--model", "opt-13b", "--hardware", "h100", "--trace", str(trace)]
    )
assert code == 0
""",
    "replay": "import fastserve.verbs.replay",
}


@pytest.mark.parametrize("name", TORCH_FREE)
def test_loads_no_torch(name):
    """Neither directly nor through anything it imports."""
    code = TORCH_FREE[name] + "\nimport sys\nassert 'torch' not in sys.modules\n"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_core_needs_only_the_standard_library():
    """The core decides; what it would need packages for is somebody else's work."""
    code = """
import importlib, pkgutil, sys, fastserve.core
for module in pkgutil.walk_packages(fastserve.core.__path__, "fastserve.core."):
    importlib.import_module(module.name)
roots = {name.partition(".")[0] for name in sys.modules}
foreign = {"numpy", "msgspec", "httpx", "fastapi", "yaml", "rich", "prometheus_client"} & roots
assert not foreign, foreign
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_no_modules_import_each_other_in_a_circle():
    """Imports for types alone count too; those of the public names, on first use, do not."""
    graph = grimp.build_graph("fastserve", exclude_type_checking_imports=False, cache_dir=None)
    for door in ("fastserve.llm", "fastserve.offline.sampling_params"):
        graph.remove_import(importer="fastserve", imported=door)
    imported = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    assert len(imported) > 150
    TopologicalSorter(imported).prepare()  # a CycleError names the circle
