"""A fault in a step of the real worker, once."""

from __future__ import annotations

from typing import Any

import pytest

from fastserve.engine.engine import Engine
from fastserve.executor.local import LocalExecutor

REASON = "in the middle of a step"


def fail_once(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """Let the engine's next step raise, after it has changed what a step changes."""
    assert isinstance(engine.executor, LocalExecutor)
    runner = engine.executor._worker.runner
    run = runner.run

    def raise_once(*args: Any) -> None:
        patch.setattr(runner, "run", run)
        run(*args)
        raise FloatingPointError(REASON)

    patch.setattr(runner, "run", raise_once)
