"""DecodeGraphs: steps of single tokens, replayed as captured CUDA graphs.

Rules: one graph for each batch size of a ladder; a batch runs in the next larger one, whose padding
attends to nothing and writes no KV. Inputs lie in one static buffer, filled by one transfer; graphs
share their memory, and logits are one static buffer too. Sampling is outside. What is not a step of
single tokens, all of them scored, is not run here.
Must not know: requests, architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastserve.model.attention.interfaces import PagedKV
from fastserve.model.families.architectures import Network
from fastserve.model.input_batch import InputBatch, Rows
from fastserve.model.staged_batch import aligned, input_parts, pack, staged, unpack

Action = Callable[[], None]
Capture = Callable[[Action], Action]
"""Takes an action over static tensors, and returns what does the same again."""

Places = list[tuple[int, int]]


class DecodeGraphs:
    """The graphs of one model over one KV tensor."""

    def __init__(
        self,
        network: Network,
        kv: PagedKV,
        *,
        batch_sizes: Sequence[int],
        max_model_len: int,
        vocab_size: int,
        prepare: Callable[[Tensor], None],
        capture: Capture,
        on_progress: Callable[[str, float], None],
    ) -> None:
        """Capture all; every step begins with `prepare` on its static ids."""
        device = kv.tensor.device
        self._is_pinned = device.type == "cuda"
        self._max_blocks = -(-max_model_len // kv.block_size)
        self._sizes = np.array(sorted(batch_sizes))
        largest = int(self._sizes[-1])
        _, places = self._pack(no_rows(), largest)
        num_inputs = places[-1][0] + aligned(largest * self._max_blocks)  # the tables come last
        self._inputs = torch.zeros(num_inputs, dtype=torch.int32, device=device)
        self._logits = torch.zeros(largest, vocab_size, dtype=torch.float32, device=device)
        self._replays: dict[int, Action] = {}
        # The largest first: the memory it took then serves the smaller ones.
        for index, size in enumerate(reversed(self._sizes.tolist())):
            on_progress("capturing CUDA graphs", index / len(self._sizes))
            host, places = self._pack(no_rows(), size)
            self._inputs[: len(host)].copy_(host)
            batch = staged(single_rows(size, max_model_len), self._views(places))

            def step(batch: InputBatch = batch, size: int = size) -> None:
                prepare(batch.token_ids)
                self._logits[:size].copy_(network(batch, kv))

            self._replays[size] = capture(step)
        on_progress("capturing CUDA graphs", 1.0)

    def can_run(self, batch: InputBatch) -> bool:
        """Whether a batch is one of single tokens that a graph was captured for."""
        rows, num_rows = batch.rows, len(batch.rows.counts)
        if rows.num_single < num_rows or num_rows > self._sizes[-1]:
            return False
        scored = range(num_rows) if batch.scored is None else batch.scored.tolist()
        return sorted(scored) == list(range(num_rows))

    def run(self, batch: InputBatch) -> Tensor:
        """Run a batch that lies on the host; its logits hold until the next call."""
        num_rows = len(batch.rows.counts)
        if batch.scored is not None:  # rows in the order of their logits
            batch = permuted(batch, batch.scored)
        size = int(self._sizes[np.searchsorted(self._sizes, num_rows)])
        host, _ = self._pack(batch, size - num_rows)
        self._inputs[: len(host)].copy_(host, non_blocking=True)
        self._replays[size]()
        return self._logits[:num_rows]

    def _pack(self, batch: InputBatch, padding: int) -> tuple[Tensor, Places]:
        """Lay out the inputs of a batch and its padding; nothing else depends on contexts."""
        token_ids, positions, blocks, offsets, rows, *rest = input_parts(batch)
        parts = [
            np.pad(token_ids, (0, padding)),
            np.pad(positions, (0, padding)),
            np.pad(blocks, (0, padding), constant_values=-1),
            np.pad(offsets, (0, padding)),
            np.pad(rows, (0, padding), constant_values=-1),
        ]
        return pack([*parts, *rest], is_pinned=self._is_pinned)

    def _views(self, places: Places) -> list[Tensor]:
        """Return the parts of the static buffer; tables reach to its end."""
        *views, _ = unpack(self._inputs, places)
        return [*views, self._inputs[places[-1][0] :]]


def ladder(max_num_seqs: int) -> list[int]:
    """Return the batch sizes worth a graph: 1, 2, 4, by eights to 64, by sixteens, the largest."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, max_num_seqs, 16)]
    return [*(size for size in steps if size < max_num_seqs), max_num_seqs]


class CudaCapture:
    """Fits `Capture`: CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, action: Action) -> Action:
        """Run the action once, so that its kernels are loaded, then capture it."""
        warm_up: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            action()
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        # Other threads may wait for events meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            action()
        return graph.replay


def permuted(batch: InputBatch, order: Tensor) -> InputBatch:
    """Return a batch of single tokens in another order."""
    rows, places = batch.rows, order.numpy()
    return InputBatch(
        rows=Rows(
            rows.starts[places],
            rows.counts,
            rows.contexts[places],
            rows.num_blocks[places],
            rows.tables[places],
            rows.num_single,
        ),
        token_ids=batch.token_ids[order],
        positions=batch.positions[order],
        write_blocks=batch.write_blocks[order],
        write_offsets=batch.write_offsets[order],
        scored=None,
    )


def no_rows() -> InputBatch:
    """Return a batch of nothing: with padding, all that a graph sees when it is captured."""
    none, nothing = np.zeros(0, np.int64), torch.zeros(0, dtype=torch.int64)
    rows = Rows(none, none, none, none, np.zeros((0, 1), np.int64), 0)
    return InputBatch(rows, nothing, nothing, nothing, nothing, None)


def single_rows(size: int, max_model_len: int) -> InputBatch:
    """Return what the host says of a captured batch: single tokens, of any context."""
    ones = np.ones(size, np.int64)
    contexts = ones * max_model_len
    tables = np.zeros((size, 1), np.int64)
    nothing = torch.zeros(0, dtype=torch.int64)
    rows = Rows(contexts - 1, ones, contexts, ones, tables, size)
    return InputBatch(rows, nothing, nothing, nothing, nothing, None)
