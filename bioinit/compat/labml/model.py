"""The layers of GPT-NeoX, one after the other, each with its files and its merged parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from bioinit.compat.labml import checkpoint
from bioinit.compat.labml._merge import How, Partition, WrongShape, merged, put
from bioinit.compat.labml.checkpoint import Places, step_folder
from bioinit.errors import ConfigError

__all__ = [
    "Embedding",
    "FinalNorm",
    "Layer",
    "LayerGenerator",
    "NeoXModule",
    "ReadoutLayer",
    "TransformerLayer",
]

_ROPE_BASE = 10_000.0
_FREQUENCIES = "attention.rotary_emb.inv_freq"

Table = Mapping[str, tuple[str, How]]
"""By the name of a parameter: its tensor in the files, and how the partitions are merged."""


class FilterError(ConfigError, ValueError):
    """Layers are asked for that there are not."""


class NeoXModule(nn.Module):
    """A layer that is loaded from its files. Stands in for ``labml_nn.neox.model.NeoXModule``."""

    TABLE: ClassVar[Table] = {}

    def load_state(self, p1: Partition, *more: Partition) -> None:
        """Put what the partitions hold of this layer into its parameters.

        Raises:
            MissingKey: a partition lacks a tensor.
            PartitionsDiffer: copies are not alike.
            WrongShape: the layer was made with other sizes.
        """
        for name, (key, how) in self.TABLE.items():
            put(self.get_parameter(name), key, how, (p1, *more))


class Embedding(NeoXModule):
    """Token embeddings. Stands in for ``labml_nn.neox.model.Embedding``."""

    TABLE: ClassVar[Table] = {"emb.weight": ("word_embeddings.weight", "dim_0")}

    def __init__(self, n_vocab: int = 50_432, n_hidden: int = 6_144) -> None:
        super().__init__()
        self.emb = nn.Embedding(n_vocab, n_hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embeddings, ``[batch, seq, hidden]``, of the ids ``[batch, seq]``."""
        return self.emb(x)  # type: ignore[no-any-return]


class AttentionLayer(nn.Module):
    """Causal attention, rotary in a quarter of each head.

    Stands in for ``labml_nn.neox.model.AttentionLayer``, without its cache of earlier states.
    """

    def __init__(
        self, n_hidden: int = 6_144, n_heads: int = 64, rope_percentage: float = 0.25
    ) -> None:
        super().__init__()
        if n_heads < 1 or n_hidden % n_heads:
            raise ConfigError(
                f"n_hidden={n_hidden} cannot be divided among n_heads={n_heads}. Give what the "
                "checkpoint was trained with."
            )
        self.n_heads = n_heads
        self.d_rope = int(n_hidden // n_heads * rope_percentage)
        self.qkv_lin = nn.Linear(n_hidden, n_hidden * 3)
        self.output = nn.Linear(n_hidden, n_hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention among all of ``[batch, seq, hidden]`` that came before."""
        # Each head has its query, key and value side by side.
        heads = self.qkv_lin(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        q, k, v = heads.chunk(3, dim=-1)
        q, k = _rotated(q, self.d_rope), _rotated(k, self.d_rope)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


def _rotated(x: torch.Tensor, d_rope: int) -> torch.Tensor:
    """``x``, ``[batch, head, seq, channel]``, its first ``d_rope`` channels turned by place."""
    steps = torch.arange(0, d_rope, 2, device=x.device, dtype=torch.float32)
    places = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
    angles = torch.outer(places, _ROPE_BASE ** (-steps / d_rope)).repeat(1, 2)
    turned, kept = x[..., :d_rope], x[..., d_rope:]
    first, second = turned.chunk(2, dim=-1)
    across = torch.cat((-second, first), dim=-1)
    turned = turned * angles.cos().to(x.dtype) + across * angles.sin().to(x.dtype)
    return torch.cat((turned, kept), dim=-1)


class FFNLayer(nn.Module):
    """The two linear layers. Stands in for ``labml_nn.neox.model.FFNLayer``."""

    def __init__(self, n_hidden: int = 6_144, d_ff: int = 0) -> None:
        super().__init__()
        d_ff = d_ff or n_hidden * 4
        self.dense_h_h4 = nn.Linear(n_hidden, d_ff)
        self.dense_h4_h = nn.Linear(d_ff, n_hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Each place by itself."""
        return self.dense_h4_h(functional.gelu(self.dense_h_h4(x)))  # type: ignore[no-any-return]


class TransformerLayer(NeoXModule):
    """Attention and feed-forward in parallel, for ``labml_nn.neox.model.TransformerLayer``."""

    TABLE: ClassVar[Table] = {
        "attention.output.bias": ("attention.dense.bias", "sum"),
        "attention.output.weight": ("attention.dense.weight", "dim_1"),
        "attention.qkv_lin.bias": ("attention.query_key_value.bias", "dim_0"),
        "attention.qkv_lin.weight": ("attention.query_key_value.weight", "dim_0"),
        "pre_ln_attn.bias": ("input_layernorm.bias", "duplicate"),
        "pre_ln_attn.weight": ("input_layernorm.weight", "duplicate"),
        "ffn.dense_h_h4.bias": ("mlp.dense_h_to_4h.bias", "dim_0"),
        "ffn.dense_h_h4.weight": ("mlp.dense_h_to_4h.weight", "dim_0"),
        "ffn.dense_h4_h.bias": ("mlp.dense_4h_to_h.bias", "sum"),
        "ffn.dense_h4_h.weight": ("mlp.dense_4h_to_h.weight", "dim_1"),
        "pre_ln_ffn.bias": ("post_attention_layernorm.bias", "duplicate"),
        "pre_ln_ffn.weight": ("post_attention_layernorm.weight", "duplicate"),
    }

    def __init__(self, n_hidden: int = 6_144, n_heads: int = 64) -> None:
        super().__init__()
        self.pre_ln_attn = nn.LayerNorm(n_hidden)
        self.pre_ln_ffn = nn.LayerNorm(n_hidden)
        self.attention = AttentionLayer(n_hidden, n_heads)
        self.ffn = FFNLayer(n_hidden)

    def load_state(self, p1: Partition, *more: Partition) -> None:
        """As of any layer; also, what they say of a head must be what this layer has."""
        turned = self.attention.d_rope
        for part in (p1, *more):
            said = part.get(_FREQUENCIES)
            if said is not None and 2 * said.numel() != turned:
                raise WrongShape(
                    f"{_FREQUENCIES} is of heads of which {2 * said.numel()} channels are turned, "
                    f"and with n_heads={self.attention.n_heads} it is {turned}. Give the n_heads "
                    "that the checkpoint was trained with."
                )
        super().load_state(p1, *more)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, seq, hidden]`` with what both branches add to it."""
        mixed = self.attention(self.pre_ln_attn(x)) + self.ffn(self.pre_ln_ffn(x))
        return mixed + x  # type: ignore[no-any-return]


class FinalNorm(NeoXModule):
    """The norm after the last layer. Stands in for ``labml_nn.neox.model.FinalNorm``."""

    TABLE: ClassVar[Table] = {
        "ln.bias": ("norm.bias", "duplicate"),
        "ln.weight": ("norm.weight", "duplicate"),
    }

    def __init__(self, n_hidden: int = 6_144) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(n_hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalized ``[batch, seq, hidden]``."""
        return self.ln(x)  # type: ignore[no-any-return]


class ReadoutLayer(NeoXModule):
    """Logits of the vocabulary. Stands in for ``labml_nn.neox.model.ReadoutLayer``."""

    TABLE: ClassVar[Table] = {"linear.weight": ("final_linear.weight", "dim_0")}

    def __init__(self, n_hidden: int = 6_144, n_vocab: int = 50_432) -> None:
        super().__init__()
        self.linear = nn.Linear(n_hidden, n_vocab, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, ``[batch, seq, vocab]``."""
        return self.linear(x)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Layer:
    """A layer of the checkpoint, for a model of your own.

    ``index`` is what ``filter_layers`` counts; ``parameters`` are merged, by the names that the
    modules here and labml's give them, so ``module.load_state_dict(layer.parameters)`` fits.
    """

    index: int
    kind: type[NeoXModule]
    files: tuple[str, ...]
    parameters: dict[str, torch.Tensor]


class LayerGenerator:
    """The layers of a checkpoint in their order, one in memory at a time.

    Stands in for ``labml_nn.neox.model.LayerGenerator``. The files of final norm and readout are
    those that the checkpoint has, of any depth and number of partitions, and an index that no layer
    has is an error; the original passed over it. Int8 is not converted here.

    Args:
        n_vocab: rows of embeddings and readout, padding included.
        n_hidden: the width.
        n_layers: how many transformer layers, from the first.
        n_heads: heads of each.
        filter_layers: which to give: 0 is the embedding, ``i + 1`` transformer layer ``i``,
            ``n_layers + 1`` the final norm, ``n_layers + 2`` the readout. All if None.
        is_clone_layers: changes nothing: layers that are loaded are not initialized first.
        dtype: of the layers given.
        device: of the layers given.
        is_llm_int8: must be false.
        llm_int8_threshold: changes nothing.
        is_flash_attention: changes nothing: torch chooses the kernel.
        path: the folder of the step, or the one with ``latest``;
            :func:`~bioinit.compat.labml.get_checkpoints_download_path` if None.
        depth: how many transformer layers the checkpoint has. If None its files say it, and where
            there are none, 44.
        partitions: in how many files a layer is; as ``depth``, else 2.

    Raises:
        ConfigError: ``filter_layers`` asks for layers that there are not, or int8 is wanted; when
            layers are asked for, the checkpoint has not so many.
    """

    def __init__(
        self,
        *,
        n_vocab: int = 50_432,
        n_hidden: int = 6_144,
        n_layers: int = 44,
        n_heads: int = 64,
        filter_layers: Collection[int] | None = None,
        is_clone_layers: bool = True,
        dtype: torch.dtype = torch.float,
        device: torch.device | str = "cpu",
        is_llm_int8: bool = False,
        llm_int8_threshold: float = 6.0,
        is_flash_attention: bool | None = None,
        path: str | PathLike[str] | None = None,
        depth: int | None = None,
        partitions: int | None = None,
    ) -> None:
        if is_llm_int8:
            raise ConfigError(
                "cannot convert layers to int8: bioinit loads weights as they are. Load them with "
                "is_llm_int8=False and give them to the library that quantizes."
            )
        every = range(n_layers + 3)
        wanted = set(every) if filter_layers is None else set(filter_layers)
        if unknown := sorted(wanted.difference(every), key=str):
            raise FilterError(
                f"filter_layers has {unknown[0]!r}, but a model of {n_layers} layers has the "
                f"indices 0 to {n_layers + 2}: embedding, layers, final norm, readout. Choose "
                "among them."
            )
        self.n_vocab = n_vocab
        self.n_hidden = n_hidden
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.filter_layers = wanted
        self.is_clone_layers = is_clone_layers
        self.dtype = dtype
        self.device = torch.device(device)
        self.path = path
        self.depth = depth
        self.partitions = partitions

    @property
    def total_layers(self) -> int:
        """How many layers there are without a filter."""
        return self.n_layers + 3

    def get_layers(self) -> Iterator[tuple[NeoXModule, tuple[str, ...]]]:
        """Each layer as its constructor initializes it, and the names of its files."""
        for _, kind, files in self._chosen():
            yield self._made(kind, self.device), files

    def load(self) -> Iterator[NeoXModule]:
        """Each layer, loaded. Its files are read when it is asked for."""
        for _, kind, files in self._chosen():
            # What is on meta is not initialized, and every parameter is loaded.
            layer = self._made(kind, torch.device("meta")).to_empty(device=self.device)
            layer.load_state(*checkpoint.load_checkpoint_files(files, path=self.path))
            yield layer

    def merged(self) -> Iterator[Layer]:
        """Each layer as its index, its files and its merged parameters, for modules of your own."""
        for index, kind, files in self._chosen():
            parts = checkpoint.load_checkpoint_files(files, path=self.path)
            parameters = {
                name: merged(key, how, parts).to(self.device, self.dtype)
                for name, (key, how) in kind.TABLE.items()
            }
            yield Layer(index, kind, files, parameters)

    @property
    def _folder(self) -> Path:
        return step_folder(self.path)

    def _places(self) -> Places:
        found = Places.of(self._folder, self.depth)
        return found if self.partitions is None else found._replace(partitions=self.partitions)

    def _chosen(self) -> Iterator[tuple[int, type[NeoXModule], tuple[str, ...]]]:
        places = self._places()
        last = self.n_layers + 1
        kinds: dict[int, type[NeoXModule]] = {0: Embedding, last: FinalNorm, last + 1: ReadoutLayer}
        for index, number in enumerate(places.numbers(self.n_layers)):
            if index in self.filter_layers:
                yield index, kinds.get(index, TransformerLayer), places.files(number)

    def _made(self, kind: type[NeoXModule], device: torch.device) -> NeoXModule:
        sizes: dict[type[NeoXModule], tuple[int, ...]] = {
            Embedding: (self.n_vocab, self.n_hidden),
            TransformerLayer: (self.n_hidden, self.n_heads),
            FinalNorm: (self.n_hidden,),
            ReadoutLayer: (self.n_hidden, self.n_vocab),
        }
        with torch.device(device):
            return kind(*sizes[kind]).to(self.dtype)
