"""Block: `block_size` tokens of KV as content, and the life of its copies on the two tiers.

A Block is content, not place: it is append-only, immutable once full, and outlives the request
that computed it as long as a place of it is not needed. Its copies come and go:

                 ┌──────────── forget_host ────────────┐
                 ▼                                     │
     take ──►  DIRTY ── save ──► SAVING ── saved ──► CLEAN ◄── loaded ── LOADING
                 │                │   ▲                │                   ▲
               leave            leave stay             drop               load
                 │                ▼   │                ▼                   │
                 └───────────► LEAVING ── saved ──►  HOST ─────────────────┘

    and GONE from DIRTY, CLEAN, HOST where nobody needs it, or from LOADING where the copy failed;
    SAVING and LEAVING whose copy failed are DIRTY again

Rules: STATES and TRANSITIONS are all there is: what is not in the table cannot be done. A copy is
under way in SAVING, LEAVING and LOADING, one at a time. Must not know: requests, policies, tensors.
"""

from __future__ import annotations

from enum import Enum, auto

NO_PLACE = -1


class Residence(Enum):
    """Where one copy of a Block is in its life."""

    ABSENT = auto()
    ARRIVING = auto()
    PRESENT = auto()
    LEAVING = auto()


class State(Enum):
    """Which copies there are; on the device a step may read what is DIRTY, SAVING or CLEAN."""

    __hash__ = object.__hash__  # each is the only one; Enum's own is slow, and every step asks

    DIRTY = auto()  # on the device alone
    SAVING = auto()  # on the device, and on its way to the host
    LEAVING = auto()  # the same, and its place on the device is free when it has arrived
    CLEAN = auto()  # on both: its place on the device can be had for nothing
    HOST = auto()  # on the host alone
    LOADING = auto()  # on the host, and on its way to the device
    GONE = auto()  # nowhere


STATES = {
    State.DIRTY: (Residence.PRESENT, Residence.ABSENT),
    State.SAVING: (Residence.PRESENT, Residence.ARRIVING),
    State.LEAVING: (Residence.LEAVING, Residence.ARRIVING),
    State.CLEAN: (Residence.PRESENT, Residence.PRESENT),
    State.HOST: (Residence.ABSENT, Residence.PRESENT),
    State.LOADING: (Residence.ARRIVING, Residence.PRESENT),
    State.GONE: (Residence.ABSENT, Residence.ABSENT),
}
"""The residence of a Block on the device and on the host."""


class Event(Enum):
    """What happens to a Block."""

    __hash__ = object.__hash__  # as above

    SAVE = auto()  # a copy to the host begins, ahead of need
    LEAVE = auto()  # its place on the device is needed
    STAY = auto()  # and is needed no more
    SAVED = auto()
    SAVE_FAILED = auto()
    DROP = auto()  # its place on the device is given up
    LOAD = auto()  # a copy to the device begins
    LOADED = auto()
    LOAD_FAILED = auto()
    FORGET_HOST = auto()  # its place on the host is given up
    FORGET = auto()  # nobody needs it


TRANSITIONS = {
    (State.DIRTY, Event.SAVE): State.SAVING,
    (State.DIRTY, Event.LEAVE): State.LEAVING,
    (State.SAVING, Event.LEAVE): State.LEAVING,
    (State.LEAVING, Event.STAY): State.SAVING,
    (State.SAVING, Event.SAVED): State.CLEAN,
    (State.LEAVING, Event.SAVED): State.HOST,
    (State.SAVING, Event.SAVE_FAILED): State.DIRTY,
    (State.LEAVING, Event.SAVE_FAILED): State.DIRTY,
    (State.CLEAN, Event.DROP): State.HOST,
    (State.HOST, Event.LOAD): State.LOADING,
    (State.LOADING, Event.LOADED): State.CLEAN,
    (State.LOADING, Event.LOAD_FAILED): State.GONE,
    (State.CLEAN, Event.FORGET_HOST): State.DIRTY,
    (State.DIRTY, Event.FORGET): State.GONE,
    (State.CLEAN, Event.FORGET): State.GONE,
    (State.HOST, Event.FORGET): State.GONE,
}


class Block:
    """`block_size` token positions of KV in every layer.

    `refs` counts the tables that name it, `wanted` those of them that are to run; what is not
    wanted may be moved. `hash` identifies the ids of this block and of all before it; None until
    the block is full and its ids are known. A place is NO_PLACE where there is none.
    """

    __slots__ = ("device_id", "hash", "host_id", "refs", "state", "wanted")

    def __init__(self, device_id: int) -> None:
        self.device_id = device_id
        self.host_id = NO_PLACE
        self.state = State.DIRTY
        self.refs = 0
        self.wanted = 0
        self.hash: bytes | None = None

    def __repr__(self) -> str:
        return (
            f"Block({self.state.name}, device_id={self.device_id}, host_id={self.host_id}, "
            f"refs={self.refs}, wanted={self.wanted}, hash={self.hash!r})"
        )

    @property
    def is_on_device(self) -> bool:
        """Whether a step may read it."""
        return self.state in ON_DEVICE

    @property
    def is_moving(self) -> bool:
        """Whether a copy of it is under way."""
        return self.state in MOVING

    def meet(self, event: Event) -> None:
        """Go to the next state. Raises KeyError where the event cannot happen."""
        self.state = TRANSITIONS[self.state, event]


ON_DEVICE = frozenset({State.DIRTY, State.SAVING, State.CLEAN})
MOVING = frozenset({State.SAVING, State.LEAVING, State.LOADING})
