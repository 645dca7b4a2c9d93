"""TiledAttention: paged attention in plain torch, with the same bits for a token in any batch.

Rules: every token is a row of its own, whether it came alone or in a chunk; rows are taken a fixed
number at a time, and what they attend to in tiles of fixed positions, so that each product has one
shape. A tile that lies past a row's context changes nothing in it, to the bit. Rows that fill up
the last group repeat another, and positions past a context repeat its first: nothing is read that
was not written. It is not fast: it serves where there are no compiled kernels.
Must not know: requests, weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastserve.model.attention.interfaces import LayerAttention, LayerKV, rotate_and_write
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.input_batch import InputBatch, IntArray

NUM_ROWS = 16
TILE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Tile:
    """The same positions of the rows of a group."""

    blocks: Tensor  # [NUM_ROWS, TILE_TOKENS]
    offsets: Tensor  # [NUM_ROWS, TILE_TOKENS]
    hidden: Tensor  # [NUM_ROWS, 1, 1, TILE_TOKENS] whether the position is past the row's own


@dataclass(frozen=True, slots=True)
class Group:
    """Tokens that are computed together."""

    tokens: Tensor  # [NUM_ROWS] rows of the batch
    num_tokens: int  # how many of them are no filling
    tiles: tuple[Tile, ...]


class TiledAttention:
    """Fits `Attention`."""

    def __init__(self, shape: AttentionShape) -> None:
        self.shape = shape

    def plan(self, batch: InputBatch) -> LayerAttention:
        groups: list[Group] = []
        num_heads, num_kv_heads = self.shape.num_heads, self.shape.num_kv_heads

        def run(qkv: Tensor, rotations: Tensor | None, layer: LayerKV) -> Tensor:
            if not groups:  # the first layer
                groups.extend(make_groups(batch, layer.both.shape[2]))
            if rotations is not None:
                rotate_(qkv[:, : num_heads + num_kv_heads], rotations)
            rotate_and_write(qkv, None, layer, batch, num_heads)
            return torch.cat([self._attend(qkv, layer, group) for group in groups])

        return run

    def _attend(self, qkv: Tensor, layer: LayerKV, group: Group) -> Tensor:
        group_size, head_dim = self.shape.group_size, self.shape.head_dim
        shape = (NUM_ROWS, self.shape.num_kv_heads, group_size)
        query = qkv[group.tokens, : self.shape.num_heads].float().mul_(self.shape.scale)
        query = query.view(-1, group_size, head_dim)  # [rows * kv_heads, group, head_dim]
        peak = query.new_full((*shape, 1), -torch.inf)
        total = query.new_zeros((*shape, 1))
        mixed = query.new_zeros((*shape, head_dim))
        for tile in group.tiles:
            keys, values = self._read(layer, tile)
            scores = torch.bmm(query, keys.mT).view(*shape, TILE_TOKENS)
            scores.masked_fill_(tile.hidden, -torch.inf)
            higher = torch.maximum(peak, scores.amax(-1, keepdim=True))
            kept = (peak - higher).exp_()
            weights = scores.sub_(higher).exp_()
            total = total.mul_(kept).add_(weights.sum(-1, keepdim=True))
            added = torch.bmm(weights.view(-1, group_size, TILE_TOKENS), values)
            mixed = mixed.mul_(kept).add_(added.view_as(mixed))
            peak = higher
        mixed = mixed.div_(total).view(NUM_ROWS, -1)
        return mixed[: group.num_tokens].to(qkv.dtype)

    def _read(self, layer: LayerKV, tile: Tile) -> tuple[Tensor, Tensor]:
        """Return keys and values [rows * kv_heads, TILE_TOKENS, head_dim] in float32."""
        both = layer.both[tile.blocks, :, tile.offsets]  # [rows, tile, 2, kv_heads * head_dim]
        both = both.view(NUM_ROWS, TILE_TOKENS, 2, self.shape.num_kv_heads, self.shape.head_dim)
        both = both.permute(2, 0, 3, 1, 4).float().contiguous().flatten(1, 2)
        return both[0], both[1]


def make_groups(batch: InputBatch, block_size: int) -> list[Group]:
    """Group the tokens of a step in their order."""
    rows, device = batch.rows, batch.token_ids.device
    owners = np.repeat(np.arange(len(rows.counts)), rows.counts)  # of each token, its row
    positions = batch.positions.cpu().numpy()
    groups = []
    for start in range(0, len(owners), NUM_ROWS):
        num_tokens = min(NUM_ROWS, len(owners) - start)
        tokens = start + np.arange(NUM_ROWS) % num_tokens
        tables, last = rows.tables[owners[tokens]], positions[tokens, None]
        tiles = tuple(
            _make_tile(first, tables, last, block_size, device)
            for first in range(0, int(last.max()) + 1, TILE_TOKENS)
        )
        groups.append(Group(torch.from_numpy(tokens).to(device), num_tokens, tiles))
    return groups


def _make_tile(
    first: int,
    tables: IntArray,  # [NUM_ROWS, blocks]
    last: IntArray,  # [NUM_ROWS, 1] position of the token
    block_size: int,
    device: torch.device,
) -> Tile:
    positions = np.arange(first, first + TILE_TOKENS)
    is_hidden = positions > last  # [NUM_ROWS, TILE_TOKENS]
    positions = np.where(is_hidden, 0, positions)
    blocks = np.take_along_axis(tables, positions // block_size, axis=1)
    return Tile(
        blocks=torch.from_numpy(blocks).to(device),
        offsets=torch.from_numpy(positions % block_size).to(device),
        hidden=torch.from_numpy(is_hidden[:, None, None]).to(device),
    )


def rotate_(heads: Tensor, rotations: Tensor) -> None:
    """Rotate `heads` [num_tokens, heads, head_dim] in place, in plain sums and products.

    A complex product may be contracted at one place of a tensor and not at another.
    """
    cosine, sine = torch.view_as_real(rotations).unbind(-1)  # [num_tokens, 1, head_dim / 2]
    x, y = heads[..., 0::2].float(), heads[..., 1::2].float()
    rotated_x = (x * cosine).sub_(y * sine)
    rotated_y = (x * sine).add_(y * cosine)
    heads[..., 0::2] = rotated_x
    heads[..., 1::2] = rotated_y
