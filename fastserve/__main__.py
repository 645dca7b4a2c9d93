"""`python -m fastserve` is the `fastserve` command."""

from __future__ import annotations

import sys

from fastserve.cli import main

if __name__ == "__main__":
    sys.exit(main())
