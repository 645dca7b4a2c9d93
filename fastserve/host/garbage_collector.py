"""The garbage collector of a process that serves.

Must not know: what is served.
"""

from __future__ import annotations

import gc


def quiet_garbage_collector() -> None:
    """Keep the cycle collector from pausing every stream.

    What a step allocates are acyclic tuples that reference counting frees; a full collection over
    the model and ten thousand requests takes tens of milliseconds and finds nothing.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 50, 1000)


def leave_startup_alone() -> None:
    """Keep the cycle collector off what is there already, and have it look less often.

    For a process whose requests leave cycles, as failures with their tracebacks are: these are
    still found, but a full collection no longer goes over all that was imported.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
