"""Builds the kernels for a processor with AMX, and uses its tiles throughout: `pytest -p` it.

Where the processor has none, tile_emulator.cpp is to be loaded before the program.
"""

from __future__ import annotations

import math

from fastserve.model.kernels.cpu import kernel_choice, native

FLAGS = ("-mamx-tile", "-mamx-bf16")

native.FLAGS = (*native.FLAGS, *FLAGS)  # type: ignore[assignment] # there are as many
vars(kernel_choice).update(try_tiles=lambda *_: 1, try_onednn=lambda *_: math.inf)
