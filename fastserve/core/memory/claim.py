"""Claim: what becomes of a request's wish for the Blocks of its next tokens.

    probe     the cached beginning, found and not touched
      │
    claim     all on the device ──► MET, the table begins or grows
      │       on the host ──► is brought in; STANDS until it is there
      │       short ──► victims (coldest first) give way: swapped, or dropped ──► again
      │                 none: STANDS, later claims of this plan do not get these blocks
      │                 not allowed, or back too soon: DEFERRED, as if never asked
    advance   a step's tokens are computed; full Blocks become findable
      │
    release   at the end of a request or of its epoch (dropped): the table is closed
      │
    landed    the last step in flight that touches it is done: the Blocks go back

Rules: a claim is made anew in each plan. Must not know: which Blocks there are.
"""

from __future__ import annotations

from enum import Enum, auto


class Claim(Enum):
    """What became of a claim."""

    MET = auto()
    STANDS = auto()
    DEFERRED = auto()
