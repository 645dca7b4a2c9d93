"""Rows of ids as transformers' tokenizers return them: padded, as arrays or tensors, in a mapping.

Must not know: tokenizers.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

Tensors = Literal["np", "pt"]


class BatchEncoding(UserDict[str, Any]):
    """What calling a tokenizer returns: `input_ids` and `attention_mask`, also as attributes."""

    def __getattr__(self, name: str) -> Any:
        """Return an item."""
        data = self.__dict__.get("data", {})
        if name not in data:
            raise AttributeError(name)
        return data[name]

    def to(self, device: Any) -> BatchEncoding:
        """Move what are tensors to a device."""
        self.data = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in self.data.items()
        }
        return self


def rectangle(
    rows: Sequence[Sequence[int]], width: int | None, pad_id: int | None, side: str
) -> dict[str, list[list[int]]]:
    """Return ids and their mask, each row at least `width` long, with `pad_id` on one side."""
    ids, masks = [], []
    for row in rows:
        missing = 0 if width is None or pad_id is None else max(0, width - len(row))
        pads, zeros = [pad_id or 0] * missing, [0] * missing
        ones = [1] * len(row)
        ids.append([*pads, *row] if side == "left" else [*row, *pads])
        masks.append(zeros + ones if side == "left" else ones + zeros)
    return {"input_ids": ids, "attention_mask": masks}


def as_arrays(made: Mapping[str, list[list[int]]], tensors: Tensors) -> dict[str, Any]:
    """Return arrays or tensors of [rows, width]; ValueError for rows of different lengths."""
    if tensors not in ("np", "pt"):
        raise ValueError(f'return_tensors must be "np" or "pt", got {tensors!r}.')
    if len({len(row) for row in made["input_ids"]}) > 1:
        raise ValueError("Texts of different lengths make an array only with padding=True.")
    make = np.array if tensors == "np" else torch.tensor
    return {name: make(rows) for name, rows in made.items()}


def plain_ids(ids: Any) -> Any:
    """Return ids, from whatever array or tensor holds them, as integers in lists."""
    if hasattr(ids, "tolist"):
        return ids.tolist()
    return [plain_ids(item) for item in ids] if isinstance(ids, list | tuple) else ids
