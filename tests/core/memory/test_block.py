"""Block: the table of transitions is whole, and is the picture of it."""

from __future__ import annotations

import re
from itertools import product

import hypothesis.strategies as st
import pytest
from hypothesis import given

from fastserve.core.memory import block as block_module
from fastserve.core.memory.block import (
    MOVING,
    ON_DEVICE,
    STATES,
    TRANSITIONS,
    Block,
    Event,
    Residence,
    State,
)

A, C, P, L = Residence.ABSENT, Residence.ARRIVING, Residence.PRESENT, Residence.LEAVING

# Where an event may happen, as (device, host), and what comes of it, in turn.
EFFECTS: dict[Event, tuple[tuple[Residence, Residence], ...]] = {
    Event.SAVE: ((P, A), (P, C)),
    Event.LEAVE: ((P, A), (L, C), (P, C), (L, C)),
    Event.STAY: ((L, C), (P, C)),
    Event.SAVED: ((P, C), (P, P), (L, C), (A, P)),
    Event.SAVE_FAILED: ((P, C), (P, A), (L, C), (P, A)),
    Event.DROP: ((P, P), (A, P)),
    Event.LOAD: ((A, P), (C, P)),
    Event.LOADED: ((C, P), (P, P)),
    Event.LOAD_FAILED: ((C, P), (A, A)),
    Event.FORGET_HOST: ((P, P), (P, A)),
    Event.FORGET: ((P, A), (A, A), (P, P), (A, A), (A, P), (A, A)),
}


def block_in(state: State) -> Block:
    """Return a block that is in a state."""
    block = Block(0)
    block.state = state
    return block


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)))
def test_an_event_has_its_effect_or_cannot_happen(state: State, event: Event) -> None:
    """Each event takes a residence on two tiers to another; all others are refused."""
    pairs = EFFECTS[event]
    effect = dict(zip(pairs[::2], pairs[1::2], strict=True))
    block = block_in(state)
    if STATES[state] in effect:
        block.meet(event)
        assert STATES[block.state] == effect[STATES[state]]
    else:
        with pytest.raises(KeyError):
            block.meet(event)
        assert block.state is state, "a refused event changed the block"


def test_no_two_states_are_one() -> None:
    """A state is where the two copies are, and nothing else."""
    assert set(STATES) == set(State)
    assert len(set(STATES.values())) == len(STATES)
    assert {event for _, event in TRANSITIONS} == set(Event)


def test_kv_is_never_nowhere_but_when_it_is_gone() -> None:
    """Where neither copy is whole, the block is GONE."""
    for state, (device, host) in STATES.items():
        # What leaves the device is whole there until it has arrived.
        is_somewhere = device in (P, L) or host is P
        assert is_somewhere == (state is not State.GONE)


def test_a_step_may_read_what_is_present_and_stays() -> None:
    """LEAVING is present too, but may be overwritten as soon as its copy is done."""
    assert {s for s, (device, _) in STATES.items() if device is P} == ON_DEVICE
    assert {s for s, both in STATES.items() if C in both} == MOVING
    for state in State:
        assert block_in(state).is_on_device == (state in ON_DEVICE)
        assert block_in(state).is_moving == (state in MOVING)


def test_gone_is_the_end() -> None:
    """Nothing happens to what is GONE, and only there."""
    assert {state for state, _ in TRANSITIONS} == set(State) - {State.GONE}


def test_every_copy_can_fail_and_be_done() -> None:
    """Each end of a copy that the executor may report is known in each state that moves."""
    saving = {State.SAVING, State.LEAVING}
    assert {s for s, e in TRANSITIONS if e in (Event.SAVED, Event.SAVE_FAILED)} == saving
    for state in saving:
        assert (state, Event.SAVED) in TRANSITIONS
        assert (state, Event.SAVE_FAILED) in TRANSITIONS
    for event in (Event.LOADED, Event.LOAD_FAILED):
        assert {s for s, e in TRANSITIONS if e is event} == {State.LOADING}


def test_a_copy_under_way_is_not_given_up() -> None:
    """A place that a copy reads or writes is not given back before the copy is reported."""
    ends = {Event.SAVED, Event.SAVE_FAILED, Event.LOADED, Event.LOAD_FAILED}
    for (before, event), after in TRANSITIONS.items():
        if before in MOVING and event not in ends:
            assert after in MOVING
        if event in ends:
            assert before in MOVING
            assert after not in MOVING


@given(st.lists(st.sampled_from(Event), max_size=40))
def test_a_life_is_one_copy_at_a_time(events: list[Event]) -> None:
    """However events come, a copy ends before another begins."""
    block, is_copying = Block(0), False
    for event in events:
        was = block.is_moving
        try:
            block.meet(event)
        except KeyError:
            continue
        if block.is_moving and not was:
            assert not is_copying
            is_copying = True
        elif was and not block.is_moving:
            assert is_copying
            is_copying = False


def nearest(row: str, column: int) -> State:
    """Return the state whose name in a row of the picture is over or under a column."""
    names = [(match.start(), match.end(), match.group()) for match in re.finditer("[A-Z]+", row)]
    return State[min(names, key=lambda name: abs((name[0] + name[1]) / 2 - column))[2]]


def pictured() -> set[tuple[State, str, State]]:
    """Return the arrows of the picture in the docstring."""
    rows = (block_module.__doc__ or "").splitlines()
    top, main, middle, foot = (
        next(row for row in rows if label in row)
        for label in ("forget_host", "take ──►", "leave stay", "LEAVING ── saved")
    )
    arrows = {(nearest(main, top.index("┐")), "forget_host", nearest(main, top.index("┌")))}
    for row in (main, foot):
        for first, label, second in re.findall(r"(?=\b([A-Z]+) ── (\w+) ──► +([A-Z]+))", row):
            arrows.add((State[first], label, State[second]))
        for first, label, second in re.findall(r"\b([A-Z]+) ◄── (\w+) ── ([A-Z]+)", row):
            arrows.add((State[second], label, State[first]))
    for match in re.finditer("[a-z]+", middle):
        upper = nearest(main, match.start())
        # The lines at both ends of the foot turn to the state beside them.
        lower = State.LEAVING if upper in (State.DIRTY, State.SAVING) else State.HOST
        is_up = match.group() in ("stay", "load")
        arrows.add((lower, match.group(), upper) if is_up else (upper, match.group(), lower))
    return arrows


def test_the_picture_is_the_table() -> None:
    """Every arrow is a transition; what has none is told in words under it."""
    told = {Event.FORGET, Event.SAVE_FAILED, Event.LOAD_FAILED}
    assert pictured() == {
        (before, event.name.lower(), after)
        for (before, event), after in TRANSITIONS.items()
        if event not in told
    }
    words = (block_module.__doc__ or "").split("and GONE from")[1].split("Rules:")[0]
    gone, dirty = words.split(";")
    for states, after, events in (
        (gone, State.GONE, (Event.FORGET, Event.LOAD_FAILED)),
        (dirty.replace("DIRTY", ""), State.DIRTY, (Event.SAVE_FAILED,)),
    ):
        befores = {before for (before, event), to in TRANSITIONS.items() if event in events}
        assert {State[name] for name in re.findall("[A-Z]+", states)} == befores
        assert {to for (_, event), to in TRANSITIONS.items() if event in events} == {after}
