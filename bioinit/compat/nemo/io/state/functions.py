"""The functions that converters of transformers need again and again.

Megatron keeps the query heads of a group beside the key and the value that they share: for every
group ``[q, ..., q, k, v]``, a head of ``kv_channels`` rows each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from bioinit.compat.nemo.io.state.context import TransformCTX
from bioinit.compat.nemo.io.state.pairing import TransformError


class LayoutError(TransformError, RuntimeError):
    """A tensor has not the rows that the config's heads say."""


class _Heads(NamedTuple):
    """How a config divides the rows of an attention."""

    heads: int
    groups: int
    rows: int
    """Of one head."""

    @classmethod
    def of(cls, config: Any) -> _Heads:
        heads = config.num_attention_heads
        groups = config.num_query_groups
        rows = config.kv_channels
        # None is what a config of Megatron has until it is finished; these are its own rules.
        groups = heads if groups is None else groups
        rows = config.hidden_size // heads if rows is None else rows
        if heads % groups:
            raise LayoutError(
                f"{heads} attention heads cannot be divided into num_query_groups={groups}. "
                "Correct the config."
            )
        return cls(heads, groups, rows)

    def joined(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Any:
        per_group = self.heads // self.groups
        parts = [
            self._grouped(name, tensor, count)
            for name, tensor, count in (
                ("queries", queries, per_group),
                ("keys", keys, 1),
                ("values", values, 1),
            )
        ]
        return torch.cat(parts, dim=1).reshape(-1, *queries.shape[1:])

    def divided(self, joined: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        per_group = self.heads // self.groups
        grouped = self._grouped("queries, keys and values", joined, per_group + 2)
        parts = torch.split(grouped, [per_group, 1, 1], dim=1)
        queries, keys, values = (
            part.clone(memory_format=torch.contiguous_format).reshape(-1, *joined.shape[1:]).cpu()
            for part in parts
        )
        return queries, keys, values

    def apart(self, stacked: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """All queries, then all keys, then all values."""
        self._grouped("queries, keys and values", stacked, self.heads // self.groups + 2)
        sizes = [self.heads * self.rows, self.groups * self.rows, self.groups * self.rows]
        return torch.split(stacked, sizes)

    def _grouped(self, what: str, tensor: torch.Tensor, count: int) -> torch.Tensor:
        """The rows as ``[group, head, row, ...]``."""
        wanted = self.groups * count * self.rows
        if not tensor.ndim or tensor.shape[0] != wanted:
            raise LayoutError(
                f"the {what} are a tensor of {list(tensor.shape)}, but {self.heads} heads in "
                f"{self.groups} groups of {self.rows} rows a head need {wanted} rows. Correct the "
                "config (num_attention_heads, num_query_groups, kv_channels), or the source key."
            )
        return tensor.reshape(self.groups, count, self.rows, *tensor.shape[1:])


class TransformFns:
    """Ready functions for :func:`state_transform`: ``nemo.lightning.io.state.TransformFns``.

    ``split_*`` read the config of ``ctx.source``, ``merge_*`` that of ``ctx.target``:
    ``num_attention_heads``, ``num_query_groups`` and ``kv_channels``. Tensors that do not have the
    rows these say are an error that gives both numbers.
    """

    @staticmethod
    def split_qkv(
        ctx: TransformCTX, linear_qkv: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Megatron's joined weight as query, key and value, on the CPU.

        It may have any number of columns (a LoRA ``B`` has as many as its rank).
        """
        return _Heads.of(ctx.source.config).divided(linear_qkv)

    @staticmethod
    def split_qkv_bias(
        ctx: TransformCTX, qkv_bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Megatron's joined bias as those of query, key and value, on the CPU."""
        return _Heads.of(ctx.source.config).divided(qkv_bias)

    @staticmethod
    def merge_qkv(
        ctx: TransformCTX, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Query, key and value as Megatron's joined weight.

        The original takes ``hidden_size`` columns only; here any number (a LoRA ``B``).
        """
        joined: torch.Tensor = _Heads.of(ctx.target.config).joined(q, k, v)
        return joined

    @staticmethod
    def merge_qkv_concat(ctx: TransformCTX, qkv: torch.Tensor) -> torch.Tensor:
        """All queries, all keys, all values in one tensor as Megatron's joined weight."""
        q, k, v = _Heads.of(ctx.target.config).apart(qkv)
        return TransformFns.merge_qkv(ctx, q, k, v)

    @staticmethod
    def merge_qkv_bias(
        ctx: TransformCTX, qb: torch.Tensor, kb: torch.Tensor, vb: torch.Tensor
    ) -> torch.Tensor:
        """The biases of query, key and value as Megatron's joined bias."""
        joined: torch.Tensor = _Heads.of(ctx.target.config).joined(qb, kb, vb)
        return joined

    @staticmethod
    def merge_qkv_bias_concat(ctx: TransformCTX, qkv_bias: torch.Tensor) -> torch.Tensor:
        """Biases of all queries, all keys, all values as Megatron's joined bias."""
        qb, kb, vb = _Heads.of(ctx.target.config).apart(qkv_bias)
        return TransformFns.merge_qkv_bias(ctx, qb, kb, vb)

    @staticmethod
    def merge_fc1(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The two projections of a gated MLP as one, the gate first."""
        return torch.cat((gate, up), dim=0)

    @staticmethod
    def split_fc1(linear_fc1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gate and the other projection of a gated MLP.

        An odd number of rows is an error; the original gives the gate one row more.
        """
        if not linear_fc1.ndim or linear_fc1.shape[0] % 2:
            raise LayoutError(
                f"a tensor of {list(linear_fc1.shape)} has no two halves along its first dim. It "
                "must be the gate on top of the other projection; correct the source key."
            )
        gate, up = torch.chunk(linear_fc1, 2, dim=0)
        return gate, up

    @staticmethod
    def duplicate2(param: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One tensor for two targets."""
        return param, param

    @staticmethod
    def duplicate3(param: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One tensor for three targets."""
        return param, param, param

    @staticmethod
    def prune_padding(ctx: TransformCTX, embedding: torch.Tensor) -> torch.Tensor:
        """The first ``ctx.target.config.vocab_size`` rows.

        Fewer rows than that are an error; the original gives them back as they are.
        """
        size = ctx.target.config.vocab_size
        if embedding.shape[0] < size:
            raise LayoutError(
                f"an embedding of {list(embedding.shape)} has fewer rows than the target's "
                f"vocab_size={size}. Correct the target's config."
            )
        return embedding[:size]
