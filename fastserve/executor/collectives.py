"""What ranks exchange while they compute: sums within a stage, hidden state from stage to stage.

Rules: torch.distributed carries it: gloo between CPUs, NCCL between CUDA devices, by the same
lines. All ranks of one model meet once, before they load. Hidden state goes from a rank to the one
of the same shard in the next stage, in the order of the steps, which is the same on both sides: so
it is received ahead of need, from the moment a step is known, and sent without waiting. A rank that
finds another one gone raises PeerLostError: that one's own end says more.
Must not know: layers, what is in a step, who started the ranks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore, Store, TCPStore

from fastserve.executor.layout import Layout
from fastserve.model.parallel import ALONE, TensorGroup
from fastserve.wire.links import listen

# A peer that is silent is found by its heartbeats: here nothing is timed out.
FOREVER = timedelta(days=365)
MEETING_TIMEOUT = timedelta(seconds=60)  # between the first rank and the last to import torch


class PeerLostError(RuntimeError):
    """Another rank can no longer be reached."""


@dataclass(frozen=True, slots=True)
class Received:
    """Hidden state on its way."""

    hidden: Tensor
    work: dist.Work


class Shards:
    """Fits `TensorGroup`: the ranks of one stage."""

    def __init__(
        self, group: dist.ProcessGroup, rank: int, leader: int, *, is_ordered: bool
    ) -> None:
        """`rank` is counted within the group, whose first one is `leader` among all ranks.

        With `is_ordered` terms are added in the order of ranks, wherever in a tensor they stand.
        """
        self.rank = rank
        self.size = group.size()
        self._group = group
        self._leader = leader
        self._is_ordered = is_ordered

    def all_reduce(self, x: Tensor) -> Tensor:
        """Fit `TensorGroup`."""
        if not x.numel():
            return x
        with _peers():
            if not self._is_ordered:
                dist.all_reduce(x, group=self._group)
                return x
            parts = [torch.empty_like(x) for _ in range(self.size)]
            dist.all_gather(parts, x, group=self._group)
        total = parts[0]
        for part in parts[1:]:
            total.add_(part)
        return x.copy_(total)

    def gather(self, x: Tensor) -> Tensor | None:
        """Fit `TensorGroup`."""
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        if x.numel():
            with _peers():
                dist.gather(x, parts, self._leader, group=self._group)
        return None if parts is None else torch.cat(parts, dim=1)


class Upstream:
    """Hidden state from the stage before this one."""

    def __init__(self, rank: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        """`rank` is where it comes from, `width` that of a token's hidden state."""
        self.waited_s = 0.0  # for hidden state, in all
        self._rank = rank
        self._width = width
        self._dtype = dtype
        self._device = device
        self._expected: deque[Received] = deque()

    @torch.inference_mode()
    def expect(self, num_tokens: int) -> None:
        """Begin to receive that of one more step; callable from another thread than `take`."""
        hidden = torch.empty(num_tokens, self._width, dtype=self._dtype, device=self._device)
        with _peers():
            work = dist.irecv(hidden, self._rank)
        assert work is not None
        self._expected.append(Received(hidden, work))

    def take(self) -> Tensor:
        """Wait for that of the oldest step expected, [num_tokens, width]."""
        received = self._expected.popleft()
        begun = time.perf_counter()
        with _peers():
            received.work.wait()
            if self._device.type == "cuda":  # where only the stream has waited
                torch.cuda.current_stream(self._device).synchronize()
        self.waited_s += time.perf_counter() - begun
        return received.hidden


class Downstream:
    """Hidden state to the stage behind this one."""

    def __init__(self, rank: int, max_in_flight: int) -> None:
        """When one more step is sent, all but the last `max_in_flight` have been received."""
        self._rank = rank
        self._max_in_flight = max_in_flight
        self._sent: deque[tuple[Tensor, dist.Work]] = deque()

    def send(self, hidden: Tensor) -> None:
        """Begin to send that of a step, and return at once."""
        with _peers():
            if len(self._sent) == self._max_in_flight:
                self._sent.popleft()[1].wait()  # over by now: its step has ended
            work = dist.isend(hidden, self._rank)
        assert work is not None
        self._sent.append((hidden, work))


@dataclass(frozen=True, slots=True)
class Peers:
    """A rank's ways to the others: those of its stage, and its neighbours."""

    group: TensorGroup = ALONE
    upstream: Upstream | None = None
    downstream: Downstream | None = None

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for an earlier stage, in all."""
        return 0.0 if self.upstream is None else self.upstream.waited_s


NO_PEERS = Peers()


def meet(
    rank: int,
    layout: Layout,
    rendezvous: str,
    *,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    is_deterministic: bool,
) -> Peers:
    """Wait for all other ranks, and return the ways to those that this one exchanges with."""
    if layout.num_ranks == 1:
        return NO_PEERS
    with _peers():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=open_store(rendezvous, rank, layout.num_ranks),
            rank=rank,
            world_size=layout.num_ranks,
            timeout=FOREVER,
        )
    group: TensorGroup = ALONE
    if layout.tensor_parallel_size > 1:
        group = _meet_shards(rank, layout, is_ordered=is_deterministic)
    before, behind = layout.before(rank), layout.behind(rank)
    return Peers(
        group=group,
        upstream=None if before is None else Upstream(before, hidden_size, dtype, device),
        downstream=None if behind is None else Downstream(behind, layout.pipeline_parallel_size),
    )


def _meet_shards(rank: int, layout: Layout, *, is_ordered: bool) -> Shards:
    """Return the ranks of this one's stage; all ranks take part in making the groups of all."""
    stage, groups = layout.stage_of(rank), [dist.group.WORLD]
    if layout.pipeline_parallel_size > 1:
        with _peers():
            groups = [
                dist.new_group(list(layout.shards_of(stage)), timeout=FOREVER)
                for stage in range(layout.pipeline_parallel_size)
            ]
    group = groups[stage]
    assert group is not None, "there is a default group by now"
    leader = layout.rank_at(stage, 0)
    return Shards(group, layout.shard_of(rank), leader, is_ordered=is_ordered)


def open_store(rendezvous: str, rank: int, num_ranks: int) -> Store:
    """Return what ranks find each other by: file:///PATH, or tcp://HOST:PORT of the first one."""
    url = urlsplit(rendezvous)
    if url.scheme == "file":
        return FileStore(url.path, num_ranks)
    assert url.hostname is not None
    assert url.port is not None
    # A store that opens its port itself listens on all addresses of its host.
    listening = listen(url.hostname, url.port).detach() if rank == 0 else None
    return TCPStore(
        url.hostname,
        url.port,
        num_ranks,
        is_master=rank == 0,
        timeout=MEETING_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listening,
    )


@contextmanager
def _peers() -> Iterator[None]:
    """Say of what fails here that it is another rank's doing."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(" ".join(str(error).split())) from error
