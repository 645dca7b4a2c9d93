"""`python -m fastserve.launch`: with `--engine-fd N` the engine process, with `--rank-fd N` a rank.

Rules: a rank is heard before torch is loaded. Must not know: how any part works.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fastserve.engine import process
from fastserve.host.log import end_process, open_log
from fastserve.launch.children import ENGINE_FD, RANK_FD
from fastserve.launch.engine import open_served_engine
from fastserve.wire.child import be_child
from fastserve.wire.driver_link import DriverLink


def main(argv: Sequence[str] | None = None) -> int:
    """Be the engine process, or a rank."""
    parser = argparse.ArgumentParser(prog="python -m fastserve.launch")
    end = parser.add_mutually_exclusive_group(required=True)
    end.add_argument(ENGINE_FD, type=int, help="inherited socket to be the engine process on")
    end.add_argument(RANK_FD, type=int, help="inherited socket to be a rank on")
    args = parser.parse_args(argv)
    open_log("WARNING")
    if args.rank_fd is not None:
        return run_rank(args.rank_fd)
    return process.run(args.engine_fd, open_served_engine)


def run_rank(fd: int) -> int:
    """Be a rank on the inherited socket `fd`; it is heard before torch is loaded."""
    link = DriverLink(be_child(fd))
    from fastserve.executor import rank

    return rank.run(link)


if __name__ == "__main__":
    # All is closed by now; libraries whose threads are still about may abort an orderly exit.
    end_process(main())
