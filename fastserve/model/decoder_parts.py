"""What the families share: the embedding, the usual layer, and the head.

Must not know: families, checkpoints, requests.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastserve.model.attention.interfaces import LayerAttention, LayerKV
from fastserve.model.input_batch import InputBatch
from fastserve.model.ops.interfaces import HeadNormOp, LinearOp, MLPOp, NormOp
from fastserve.model.parallel import ALONE, TensorGroup


class Embedding:
    """Token ids as rows of a table, and positions as rows of another where they are learned."""

    def __init__(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        project: LinearOp | None = None,
        group: TensorGroup = ALONE,
    ) -> None:
        """Take tables [vocab, width] and [positions, hidden]; `project` widens rows of tokens.

        Of several ranks each has as many rows of `tokens`.
        """
        self.tokens = tokens
        self.positions = positions
        self.project = project
        self.group = group

    def __call__(self, batch: InputBatch) -> Tensor:
        """Return the hidden state [num_tokens, hidden] that the first layer takes."""
        tokens = self._rows(batch.token_ids)
        if self.positions is None:
            return tokens
        hidden = F.embedding(batch.positions, self.positions)
        if self.project is None:
            return hidden.add_(tokens)
        return self.project.add_to(hidden, tokens)

    def _rows(self, token_ids: Tensor) -> Tensor:
        if self.group.size == 1:
            return self.tokens.index_select(0, token_ids)
        here = token_ids - self.group.rank * len(self.tokens)
        is_elsewhere = (here < 0) | (here >= len(self.tokens))
        rows = F.embedding(here.masked_fill_(is_elsewhere, 0), self.tokens)
        # All ranks but one add zeros: the sum is exact.
        return self.group.all_reduce(rows.masked_fill_(is_elsewhere.unsqueeze(1), 0.0))


class PreNormLayer:
    """Fits `DecoderLayer`: a norm stands before attention, and one before the MLP."""

    def __init__(
        self,
        *,
        attention_norm: NormOp,
        qkv: LinearOp,
        output: LinearOp,
        mlp_norm: NormOp,
        mlp: MLPOp,
        head_dim: int,
        head_norm: HeadNormOp | None = None,
    ) -> None:
        self.attention_norm = attention_norm
        self.qkv = qkv
        self.output = output
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.head_dim = head_dim
        self.head_norm = head_norm

    def attend(
        self,
        hidden: Tensor,
        rotations: Tensor | None,
        layer_kv: LayerKV,
        attention: LayerAttention,
    ) -> Tensor:
        qkv = self.qkv(self.attention_norm(hidden))
        qkv = qkv.view(len(qkv), -1, self.head_dim)
        if self.head_norm is not None:
            self.head_norm(qkv)
        return attention(qkv, rotations, layer_kv)

    def add_outputs(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        hidden = self.output.add_to(hidden, mixed)
        return self.mlp.add_to(hidden, self.mlp_norm(hidden))


class Head:
    """Logits: a norm, a projection to the width of the vocabulary's table, and its product."""

    def __init__(
        self,
        vocabulary: LinearOp,
        vocab_size: int,
        *,
        norm: NormOp | None,
        project: LinearOp | None = None,
        group: TensorGroup = ALONE,
    ) -> None:
        """Take the product of the whole vocabulary, or of this rank's part, filled up."""
        self.vocabulary = vocabulary
        self.vocab_size = vocab_size
        self.norm = norm
        self.project = project
        self.group = group

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [num_scored, vocab] of `hidden` [num_scored, hidden].

        Of several ranks the first has them, and the others return no rows.
        """
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.project is not None:
            hidden = self.project(hidden)
        logits = self.group.gather(self.vocabulary(hidden))
        if logits is None:
            return hidden.new_empty((0, self.vocab_size), dtype=torch.float32)
        if logits.shape[1] > self.vocab_size:  # the last rank's part is filled up
            logits = logits[:, : self.vocab_size]
        return logits.float().contiguous()
