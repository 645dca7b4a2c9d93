"""KV memory that watches itself: promises which neither plans nor answers show.

A test makes a scheduler's cache one of these. Each promise is asserted as it is kept; what came up
is counted, so that a test can say that it did.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from fastserve.core.memory.block import Block, State
from fastserve.core.memory.claim import Claim
from fastserve.core.memory.memory import KVCacheManager
from fastserve.core.memory.reclaim import Reclaimer
from fastserve.core.memory.table import BlockTable
from fastserve.core.memory.tables import Tables
from fastserve.core.messages import Copy
from fastserve.core.request import Request


@dataclass
class Watch:
    """What was seen."""

    num_partial_swaps: int = 0  # a request gave way and kept some of its KV on the device
    num_kept_partly: int = 0  # one came back whose KV had not all gone
    num_stays: int = 0  # one came back while a copy of it to the host was under way
    num_shared_loads: int = 0  # one began that waits for a copy another is waiting for
    num_put_off: int = 0  # one that gave way was not to come back yet
    num_early: int = 0  # one came back before its time, into places that were not used
    num_due: int = 0  # or into those of others, when it was time
    num_impatient: int = 0  # or sooner, for nothing else could run
    num_head_stands: int = 0  # claims of the head of the order that had to wait
    longest_wait: float = 0.0  # of a head, as a share of the bound
    fetched: dict[BlockTable, int] = field(default_factory=dict)  # since it gave way
    num_left_over: int = 0  # one gave way that had done so before
    wait_s: float = 0.0  # of the latest that was to come back, and what it lacked
    num_lacking: int = 0
    num_unused: int = 0  # places, beyond those
    scanned: Collection[int] = ()
    head: Request | None = None
    ran_s: float = 0.0  # of the head
    num_reports: int = 0  # steps and copies that were done while this head waited


class WatchedCache(KVCacheManager):
    """The cache of a scheduler, with a Watch."""

    watch: Watch

    @classmethod
    def over(cls, cache: KVCacheManager) -> Watch:
        """Turn a cache into one that is watched."""
        cache.__class__ = cls
        assert isinstance(cache, cls)
        cache.watch = Watch()
        tables, reclaimer = cache._tables, cache._reclaimer
        tables.__class__ = WatchedTables
        reclaimer.__class__ = WatchedReclaimer
        assert isinstance(tables, WatchedTables)
        assert isinstance(reclaimer, WatchedReclaimer)
        tables.watch = reclaimer.watch = cache.watch
        return cache.watch

    # ── nobody at the head waits for ever ────────────────────────────────────────────────────

    def claim(
        self,
        request: Request,
        end: int,
        scanned: Collection[int],
        *,
        num_spare: int = 0,
        is_patient: bool = True,
    ) -> Claim:
        """Note what became of the claim of the head, and of those that gave way."""
        watch, table = self.watch, request.table
        is_away = table is not None and not table.is_resident and table.waits_since is None
        if is_away and table is not None and self._swapper is not None:
            watch.wait_s = self._swapper.wait_s(len(table.on_host()))
            watch.num_lacking, watch.num_unused = self._count_places(request, end)
        outcome = super().claim(request, end, scanned, num_spare=num_spare, is_patient=is_patient)
        if is_away:
            self._check_return(request, outcome, is_patient=is_patient)
        if request is watch.head:
            watch.num_head_stands += outcome is Claim.STANDS
            before = set(scanned) - {request.handle}
            if before or outcome is Claim.DEFERRED:
                watch.num_reports = 0  # time put others first, or it has to wait for credit
        return outcome

    @property
    def max_reports(self) -> int:
        """Copies, and steps while nothing is copied, within which the policy's first is in a step.

        Each frees a place that it lacks, brings a block of it in, or computes a token of one that
        may not lose its KV: that has just come back, or is not yet beyond where it was.
        """
        num_places = self.pool.device.num_blocks
        return num_places * (2 + self.block_size)

    def _report(self) -> None:
        watch = self.watch
        head = next(self._reclaimer._victims._policy.ordered(), None)
        ran_s = 0.0 if head is None else head.attained_s
        is_running = head is not None and (head.steps_in_flight or head.is_at_length_limit)
        if is_running or head is not watch.head or ran_s != watch.ran_s:
            watch.num_reports, watch.head, watch.ran_s = 0, head, ran_s
            return
        watch.num_reports += 1
        watch.longest_wait = max(watch.longest_wait, watch.num_reports / self.max_reports)
        assert watch.num_reports <= self.max_reports, "the head of the order waits for ever"

    def worked(self, device_s: float) -> None:
        """A step is done."""
        super().worked(device_s)
        if not self.num_copies:
            self._report()

    def copied(self, copy_id: int, *, has_failed: bool = False) -> None:
        """A copy is done; one that fails may undo all that was done for the head."""
        super().copied(copy_id, has_failed=has_failed)
        if has_failed:
            self.watch.num_reports = 0
        else:
            self._report()

    # ── who gives way, and who comes back ────────────────────────────────────────────────────

    def _count_places(self, request: Request, end: int) -> tuple[int, int]:
        """Return the places that one lacks that gave way, and those beyond that no request uses."""
        table = request.table
        assert table is not None
        left = {
            block
            for other in self.holders()
            if other.table is not None and other.table is not table
            for block in other.table.blocks
            if block.is_on_device and not block.wanted
        } - set(table.blocks)
        num_new = max(-(-end // self.block_size) - len(table.blocks), 0)
        num_lacking = len(table.on_host()) + num_new
        return num_lacking, self.num_left + self.num_leaving + len(left) - num_lacking

    def _check_return(self, request: Request, outcome: Claim, *, is_patient: bool) -> None:
        """One that gave way comes back into unused places, or when it is time, or nothing runs."""
        watch = self.watch
        if outcome is Claim.DEFERRED:
            assert is_patient, "nothing runs, and one that could is put off"
            watch.num_put_off += 1
            return
        assert request.table is not None
        if outcome is not Claim.MET and request.table.waits_since is None:
            return  # behind others
        if self._now - request.last_ran_at >= watch.wait_s:
            watch.num_due += watch.num_unused < 0
        elif not is_patient:
            watch.num_impatient += 1
        else:
            watch.num_early += 1
            assert watch.num_unused >= 0 or not watch.num_lacking, "it came back too soon"

    # ── what is fetched ahead, and brought in ────────────────────────────────────────────────

    def copies(self, now: float) -> tuple[Copy, ...]:
        """No table is fetched more than once for each time it gives way."""
        before = {table: table.num_loaded for table in self._tables.away}
        planned = super().copies(now)
        fetched = self.watch.fetched
        for table, num_loaded in before.items():
            if table.num_loaded > num_loaded:
                fetched[table] = fetched.get(table, 0) + table.num_loaded - num_loaded
                assert fetched[table] <= len(table.blocks), "fetched ahead, lost, fetched again"
        return planned

    def _begin_away(
        self, request: Request, table: BlockTable, absent: Sequence[Block], num_new: int
    ) -> Claim:
        self.watch.num_shared_loads += any(b.state is State.LOADING for b in table.blocks)
        return super()._begin_away(request, table, absent, num_new)

    def _settle(self, request: Request, table: BlockTable) -> Claim:
        outcome = super()._settle(request, table)
        if outcome is Claim.MET:
            self.watch.fetched.pop(table, None)
        return outcome


class WatchedReclaimer(Reclaimer):
    """What takes places for it."""

    watch: Watch

    def give_way(self, victim: Request, num_blocks: int) -> None:
        """Note whether a victim has given way before, and whether it keeps some of its KV."""
        table = victim.table
        assert table is not None
        self.watch.num_left_over += not table.is_wanted
        super().give_way(victim, num_blocks)
        states = {block.state for block in table.blocks}
        has_left = states & {State.HOST, State.LEAVING}
        self.watch.num_partial_swaps += bool(has_left and states - {State.HOST, State.LEAVING})


class WatchedTables(Tables):
    """Its tables."""

    watch: Watch

    def want(self, table: BlockTable, now: float) -> None:
        """Note where the KV of one that comes back is."""
        if not table.is_wanted:
            states = {block.state for block in table.blocks}
            self.watch.num_stays += State.LEAVING in states
            self.watch.num_kept_partly += State.HOST in states and len(states) > 1
        super().want(table, now)
