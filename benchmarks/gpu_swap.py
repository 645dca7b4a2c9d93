"""Copies of KV between the tiers: how fast they are, what they cost a decode, and their order.

Bandwidth is that of the engine's copier, over blocks in one run and over blocks that lie apart,
beside one plain copy from or to pinned memory. Overlap is the time of a decode while both
directions copy without a pause, over its time alone. Order is what the copier's file argues: a copy
waits for no kernel that it need not wait for, and what is reported is there.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_measure import LLAMA_3_8B, OPT_13B, decode_step, median_seconds, skipped
from benchmarks.gpu_network import BLOCK_SIZE, Capture, build_network
from fastserve.checkpoint.model_config import ModelConfig, parse_model_config
from fastserve.core.messages import Copy, CopyDirection
from fastserve.executor.copier import Copier
from fastserve.executor.facts import BlockCounts
from fastserve.executor.kv_store import KVShape, KVStore
from fastserve.model.attention.interfaces import PagedKV
from fastserve.model.ops.cuda_ops import CudaOps
from fastserve.model.ops.torch_ops import TorchOps

MODELS = {"Llama-3-8B": LLAMA_3_8B, "OPT-13B": OPT_13B}
NUM_BYTES = 2**30
DECODE_SIZE = 8
DECODE_CONTEXT = 1024
SPIN_S = 0.5
REPEATS = 5

__all__ = ["Copier", "Load", "check", "measure_bandwidth", "measure_overlap", "run", "spin"]

Spin = Callable[[float], None]
"""Keeps the compute stream busy for about so many seconds."""


class Load(NamedTuple):
    """A network and what is copied beside it."""

    name: str
    values: dict[str, Any]
    batch_size: int = DECODE_SIZE
    context: int = DECODE_CONTEXT
    num_moving: int = 64  # blocks of one copy


def run(device: torch.device) -> dict[str, Any]:
    """Measure everything."""
    rows = measure_bandwidth(device)
    overlap = measure_overlap(Load("Llama-3-8B", LLAMA_3_8B), device)
    for row in (*rows, overlap):
        print(row, flush=True)
    return {"bandwidth": rows, "overlap": overlap}


def check(device: torch.device) -> list[dict[str, Any]]:
    """Run the checks of order; one that raises has failed."""
    results = []
    for name, find in (("beside a kernel", check_beside), ("behind a report", check_behind)):
        try:
            is_ok, detail = find(device, spin)
        except Exception as error:
            is_ok, detail = False, repr(error)
        results.append({"name": f"copies {name}", "ok": is_ok, "detail": detail})
    return results


def spin(seconds: float) -> None:
    """Fit `Spin`: a cycle is at least half a nanosecond."""
    torch.cuda._sleep(int(seconds * 2e9))


def make_store(config: ModelConfig, blocks: BlockCounts, device: torch.device) -> KVStore:
    """Make bfloat16 KV of both tiers."""
    shape = KVShape(config.num_layers, config.num_kv_heads, config.head_dim)
    return KVStore(shape, blocks, block_size=BLOCK_SIZE, dtype=torch.bfloat16, device=device)


# ── bandwidth ────────────────────────────────────────────────────────────────────────────────────


def measure_bandwidth(device: torch.device, num_bytes: int = NUM_BYTES) -> list[dict[str, Any]]:
    """Return a row for each model, direction, and way in which blocks lie."""
    plain = {way: plain_gb_per_s(way, device, num_bytes) for way in CopyDirection}
    rows = []
    for name, values in MODELS.items():
        config = parse_model_config(values, source="shape")
        shape = KVShape(config.num_layers, config.num_kv_heads, config.head_dim)
        count = max(num_bytes // shape.block_bytes(BLOCK_SIZE, torch.bfloat16), 2)
        kv = make_store(config, BlockCounts(count, count), device)
        copier = Copier(kv)
        for direction in CopyDirection:
            for kind, places in (("one run", range(count)), ("apart", apart(count))):
                ids = tuple(places)
                copy = Copy(0, direction, ids, ids)
                copy_s(copier, copy)  # maps the memory
                seconds = float(np.median([copy_s(copier, copy) for _ in range(REPEATS)]))
                gb_per_s = len(ids) * kv.block_bytes / seconds / 1e9
                rows.append(
                    {
                        "model": name,
                        "direction": str(direction),
                        "blocks": kind,
                        "block_bytes": kv.block_bytes,
                        "gb_per_s": gb_per_s,
                        "share_of_plain": gb_per_s / plain[direction],
                    }
                )
        copier.close()
    return rows


def apart(count: int) -> range:
    """Return every second place, so that no two blocks are one run."""
    return range(0, count, 2)


def plain_gb_per_s(direction: CopyDirection, device: torch.device, num_bytes: int) -> float:
    """Return what one copy from or to pinned memory reaches."""
    is_cuda = device.type == "cuda"
    host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=is_cuda)
    on_device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    is_out = direction is CopyDirection.SWAP_OUT
    source, target = (on_device, host) if is_out else (host, on_device)
    seconds = median_seconds(lambda: target.copy_(source, non_blocking=True), device)
    return num_bytes / seconds / 1e9


def copy_s(copier: Copier, copy: Copy) -> float:
    """Copy, and return the seconds until it was reported."""
    ends: queue.SimpleQueue[bool] = queue.SimpleQueue()
    begun = time.perf_counter()
    copier.begin(copy, lambda copy_id, is_done: ends.put(is_done))
    if not ends.get():
        raise RuntimeError("a copy failed")
    return time.perf_counter() - begun


# ── overlap ──────────────────────────────────────────────────────────────────────────────────────


class Traffic:
    """Copies the last blocks out and back without a pause until it is stopped."""

    def __init__(self, kv: KVStore, num_blocks: int) -> None:
        self.num_bytes = 0
        self._bytes = num_blocks * kv.block_bytes
        self._copier = Copier(kv)
        self._lock = threading.Lock()
        last = len(kv.device.tensor)
        places = {
            CopyDirection.SWAP_OUT: range(last - num_blocks, last),
            CopyDirection.SWAP_IN: range(last - 2 * num_blocks, last - num_blocks),
        }
        for index, (way, found) in enumerate(places.items()):
            hosts = tuple(range(index * num_blocks, (index + 1) * num_blocks))
            src, dst = tuple(found), hosts
            if way is CopyDirection.SWAP_IN:
                src, dst = dst, src
            self._begin(Copy(index, way, src, dst))

    def _begin(self, copy: Copy) -> None:
        def go_on(copy_id: int, is_done: bool) -> None:
            with self._lock:
                self.num_bytes += self._bytes
            self._begin(copy)

        self._copier.begin(copy, go_on)

    def stop(self) -> None:
        """Copy no more."""
        self._copier.close()


@torch.inference_mode()
def measure_overlap(
    load: Load, device: torch.device, capture: Capture | None = None
) -> dict[str, Any]:
    """Return the time of a decode alone and beside copies in both directions."""
    ops = CudaOps(torch.bfloat16, TorchOps(torch.bfloat16))
    try:
        network, config = build_network(
            load.values, ops, torch.bfloat16, device, max_len=2 * load.context
        )
    except torch.OutOfMemoryError:
        return skipped(load.name, "overlap", load.batch_size, "its weights do not fit")
    read = load.batch_size * -(-load.context // BLOCK_SIZE)
    moving = 2 * load.num_moving
    kv = make_store(config, BlockCounts(read + moving, moving), device)
    # What is copied is not read: a decode finds its blocks among the first.
    first = PagedKV(kv.device.tensor[:read])
    step = decode_step(network, first, config, load.batch_size, load.context, capture)
    alone_s = median_seconds(step, device)
    traffic, begun = Traffic(kv, load.num_moving), time.perf_counter()
    beside_s = median_seconds(step, device)
    seconds = time.perf_counter() - begun
    traffic.stop()
    return {
        "model": load.name,
        "batch_size": load.batch_size,
        "context": load.context,
        "step_ms_alone": alone_s * 1e3,
        "step_ms_beside_copies": beside_s * 1e3,
        "ratio": beside_s / alone_s,
        "copied_gb_per_s": traffic.num_bytes / seconds / 1e9,
    }


# ── order ────────────────────────────────────────────────────────────────────────────────────────


def small_store(device: torch.device) -> KVStore:
    """Make a few blocks."""
    return make_store(parse_model_config(LLAMA_3_8B, source="shape"), BlockCounts(8, 8), device)


def check_beside(device: torch.device, spin: Spin) -> tuple[bool, str]:
    """Copies in both directions end while a kernel that began before them still runs."""
    kv = small_store(device)
    copier = Copier(kv)
    kv.device.tensor[:4] = 3.0
    kv.host[5].fill_(7.0)
    copy_s(copier, Copy(0, CopyDirection.SWAP_OUT, (0,), (0,)))  # starts the threads
    copy_s(copier, Copy(1, CopyDirection.SWAP_IN, (6,), (7,)))
    begun = time.perf_counter()
    spin(SPIN_S)
    out_s = copy_s(copier, Copy(2, CopyDirection.SWAP_OUT, (1,), (2,)))
    in_s = copy_s(copier, Copy(3, CopyDirection.SWAP_IN, (5,), (6,)))
    copied_s = time.perf_counter() - begun
    wait_for(device)
    spun_s = time.perf_counter() - begun
    copier.close()
    is_right = holds(kv.host[2], 3.0) and holds(kv.device.tensor[6], 7.0)
    is_beside = device.type != "cuda" or copied_s < spun_s / 2
    return is_right and is_beside, f"out {out_s:.4f} s, in {in_s:.4f} s, kernel {spun_s:.4f} s"


def check_behind(device: torch.device, spin: Spin) -> tuple[bool, str]:
    """What a reported step wrote goes out; what a reported copy brought is read by a step."""
    kv = small_store(device)
    copier = Copier(kv)
    num_wrong = 0
    for number in range(1, 51):
        spin(0.002)
        kv.device.tensor[1] = float(number)
        wait_for(device)  # the step is reported
        copy_s(copier, Copy(0, CopyDirection.SWAP_OUT, (1,), (2,)))
        num_wrong += not holds(kv.host[2], float(number))
        copy_s(copier, Copy(1, CopyDirection.SWAP_IN, (2,), (6,)))
        num_wrong += not holds(kv.device.tensor[6], float(number))
    copier.close()
    return num_wrong == 0, f"{num_wrong} of 100 copies are wrong"


def wait_for(device: torch.device) -> None:
    """Wait for the compute stream, as the engine does for a step: by an event."""
    if device.type == "cuda":
        event = torch.cuda.Event(blocking=True)
        event.record()
        event.synchronize()


def holds(block: Tensor, number: float) -> bool:
    """Whether every number of a block is this one."""
    return bool((block == number).all())
