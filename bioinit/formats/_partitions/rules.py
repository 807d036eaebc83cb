"""How each kind of tensor was divided, by name: tables of what the writers' layers do.

A column-parallel layer divides the rows of its weight (dim 0) and its bias; a row-parallel one the
columns (dim 1), and its bias is not divided: in Megatron and Savanna every partition holds a copy,
in GPT-NeoX each adds its own before the sum over partitions. Embeddings of words and readouts are
divided by rows. Everything else, norms first, is copied. A gated MLP's first layer holds its part
of the gate above its part of the other half.

No value is ever looked at. What a table does not know is settled by shapes, or not at all.

A pattern takes time in proportion to the name: what may stand anywhere in a segment is looked for
once, ahead.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

from bioinit.formats.protocol import StoredTensor
from bioinit.keys import template
from bioinit.layout import Dims

LONGEST_NAME = 300


class Rule(NamedTuple):
    """``kind`` is ``split`` along ``dim``, ``same`` or ``sum``.

    A partition's share of ``slabs`` equal parts of the dim lies one behind the other in it.
    """

    kind: str
    dim: int = 0
    slabs: int = 1


ROWS, COLUMNS = Rule("split", 0), Rule("split", 1)
GATED = Rule("split", 0, 2)
"""Rows, in halves if the layer behind is half as wide; see :meth:`Rules.find`."""
SAME, SUM = Rule("same"), Rule("sum")
UNKNOWN = Rule("unknown")
"""Known to be divided in a way that shapes would mislead about."""

# Low-rank matrices beside a layer are divided or copied as their library pleases.
_NEVER = ((r".*(adapter|lora).*", UNKNOWN),)
_EVERYWHERE = (
    # Buffers that are worked out, not learned, and masks.
    (r"(.*\.)?(inv_freq|rotary_emb.*|rotary_pos_emb.*|masked_bias)", SAME),
    (r"(.*\.)?attention\.bias", SAME),
    (r"(.*\.)?(?=\w*norm)\w*\.(weight|bias|scale|g)", SAME),
    (r"(.*\.)?(\w*_)?ln(_f)?\.(weight|bias)", SAME),
    # Transformer Engine keeps a norm inside the layer behind it.
    (r"(.*\.)?layer_norm_(weight|bias)", SAME),
    (r"(.*\.)?word_embeddings(_for_head)?\.weight", ROWS),
    # Only words are divided: positions and types are ordinary embeddings.
    (r"(.*\.)?(position|tokentype)_embeddings\.weight", SAME),
    (r"(.*\.)?(query_key_value|query|key_value)\.(weight|bias)", ROWS),
    (r"(.*\.)?(attention|mixer)\.dense\.weight", COLUMNS),
    (r"(.*\.)?dense_h_to_4h\.(weight|bias)", GATED),
    (r"(.*\.)?dense_4h_to_h\.weight", COLUMNS),
)
_NEOX = (
    (r"(.*\.)?attention\.dense\.bias", SUM),
    (r"(.*\.)?mlp\.(dense_4h_to_h|linear2|w2)\.bias", SUM),
    (r"(.*\.)?mlp\.linear1\.(weight|bias)", GATED),
    (r"(.*\.)?mlp\.linear2\.weight", COLUMNS),
    # LLaMA's: w1 gates, w3 is its other half, w2 leads back.
    (r"(.*\.)?mlp\.(w1|w3)\.(weight|bias)", ROWS),
    (r"(.*\.)?mlp\.w2\.weight", COLUMNS),
    (r"(.*\.)?(final_linear|lm_head)\.(weight|bias)", ROWS),
    # T5's bias by distance, divided by heads, which are its columns.
    (r"(.*\.)?rpe\.relative_attention_bias\.weight", COLUMNS),
    (r"(norm\.)?(weight|bias|scale)", SAME),
    # Mamba's: several matrices in one, each divided by itself, and parameters by channel.
    (r"(.*\.)?mixer\..*", UNKNOWN),
)
_SAVANNA = (
    (r"(.*\.)?mixer\.dense\.bias", SAME),
    (r"(.*\.)?mixer\.(dense_projection|hyena_proj_conv)\.\w+", ROWS),
    # The times at which filters are taken are the same everywhere; channels and groups are divided.
    (r"(.*\.)?mixer\.mixer\.filter\.t", SAME),
    (r"(.*\.)?mixer\.mixer\.(conv_bias|filter\.\w+|short_conv\.\w+)", ROWS),
    # w1 and w2 lead up, w3 leads back: not as in LLaMA.
    (r"(.*\.)?mlp\.(w1|w2)\.(weight|bias)", ROWS),
    (r"(.*\.)?mlp\.w3\.weight", COLUMNS),
    (r"(.*\.)?mlp\.(w3|dense_4h_to_h)\.bias", SAME),
    (r"(.*\.)?(final_linear|lm_head)\.(weight|bias)", ROWS),
)
_MEGATRON = (
    # Mamba's mixer: several matrices in one, each divided by itself.
    (r"(.*\.)?mixer\.(in_proj|conv1d|norm)\..*", UNKNOWN),
    (r"(.*\.)?\w*attention\.dense\.weight", COLUMNS),
    (r"(.*\.)?\w*attention\.dense\.bias", SAME),
    (r"(.*\.)?mlp\.dense_4h_to_h\.bias", SAME),
    (r"(.*\.)?linear_(qkv|q|kv|q_proj|q_up_proj|kv_up_proj)\.(weight|bias)", ROWS),
    # Transformer Engine copies these; where they are divided, the copies will be found to differ.
    (r"(.*\.)?linear_(q|kv)_down_proj\.(weight|bias)", SAME),
    (r"(.*\.)?linear_proj\.weight", COLUMNS),
    (r"(.*\.)?linear_proj\.bias", SAME),
    (r"(.*\.)?linear_fc1\.(weight|bias)\d*", GATED),
    (r"(.*\.)?linear_fc2\.weight\d*", COLUMNS),
    (r"(.*\.)?linear_fc2\.bias\d*", SAME),
    (r"(.*\.)?router\.(weight|bias|expert_bias|local_tokens_per_expert)", SAME),
    (r"(.*\.)?shared_experts\.gate_weight", SAME),
    (r"(.*\.)?output_layer\.(weight|bias)", ROWS),
    # NeMo 1's T5: a readout of its own, a bias by distance that all ranks hold, a gate apart.
    (r"(.*\.)?tokens_head\.(weight|bias)", ROWS),
    (r"(.*\.)?relative_position_embedding\.weight", SAME),
    (r"(.*\.)?dense_h_to_4h_2\.(weight|bias)", ROWS),
    # BERT's head: a dense layer of its own, and a bias for each word.
    (r"(.*\.)?lm_head\.(bias|weight)", ROWS),
    (r"(.*\.)?lm_head\.dense\.(weight|bias)", SAME),
    (r"(.*\.)?pooler\.(dense\.)?(weight|bias)", SAME),
    (r"(.*\.)?(binary|classification|multichoice)_head\.(weight|bias)", SAME),
    (r"(weight|bias)", SAME),  # Megatron-DeepSpeed's last norm has a layer file of its own
)
_TABLES = {"neox": _NEOX, "savanna": _SAVANNA, "megatron": _MEGATRON}
_PARTNERS = (
    ("linear_fc1", "linear_fc2"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("linear1", "linear2"),
)
_FUSED = re.compile(r"(.*\.)?(query_key_value|key_value)\.(weight|bias)")
_BARE = ("weight", "bias", "scale")
_SIZES_A_MODEL = re.compile(r"(.*\.)?(input|post|pre|final|attn|mlp)(?=\w*norm)\w*\.(weight|scale)")
_ANY_NORM = re.compile(r"(.*\.)?((?=\w*norm)\w*\.(weight|scale)|layer_norm_weight)")


_OF_MAMBA = re.compile(r"((in|x|dt|out)_proj|conv1d|norm)\.\w+|A_log|D|dt_bias")


def style(names: list[str]) -> str:
    """Whose layers these are, by how they are called."""
    mixers = {f".{name}".partition(".mixer.")[2] for name in names} - {""}
    if any(len(rest) > LONGEST_NAME or not _OF_MAMBA.fullmatch(rest) for rest in mixers):
        return "savanna"
    megatron = ("self_attention.", "language_model.")
    return "megatron" if any(part in name for name in names for part in megatron) else "neox"


def is_fused(name: str) -> bool:
    """Whether queries, keys and values lie in one tensor, in an order that its name hides."""
    return len(name) <= LONGEST_NAME and _FUSED.fullmatch(name) is not None


class Rules:
    """What is known about one partition's tensors, and so about how all of them are divided.

    ``tensors`` are those of the first partition. ``gated`` says whether MLPs are, where their own
    shapes do not; ``hidden`` is the width of the model, if something says it. ``is_slabbed``: a
    partition holds its heads' queries, then their keys, then their values, as Megatron had it once.
    """

    def __init__(
        self,
        table: str,
        tensors: Mapping[str, StoredTensor],
        *,
        gated: bool | None = None,
        hidden: int | None = None,
        is_slabbed: bool = False,
    ) -> None:
        self.tensors = tensors
        self.is_slabbed = is_slabbed
        self.gated = gated
        self._hidden = hidden
        self._patterns = [
            (re.compile(pattern), rule)
            for pattern, rule in (*_NEVER, *_TABLES[table], *_EVERYWHERE)
        ]
        self._known: dict[str, Rule | None] = {}
        self.deduced: set[str] = set()
        """Names for which shapes had to tell."""

    def find(self, name: str) -> Rule | None:
        """The rule for the tensor called ``name``; None if nobody knows it."""
        tensor = self.tensors[name]
        rule = self._table(name)
        if rule is None and not tensor.dtype.is_floating_point:
            return SAME
        if rule is GATED:
            return self._first_layer(name)
        if self.is_slabbed and (found := _FUSED.fullmatch(name)):
            return Rule("split", 0, 3 if found[2] == "query_key_value" else 2)
        if name in _BARE and len(tensor.shape) > 1:  # a norm's names, but not a norm
            rule = None
        if rule is UNKNOWN:
            return None
        if rule is None or (len(tensor.shape) <= rule.dim and rule.kind == "split"):
            rule = self._by_shape(tensor.shape)
            self.deduced.add(name)
        return rule

    @cached_property
    def hidden(self) -> int | None:
        """The width of the model: what was given, or the usual size of a norm."""
        if self._hidden is not None:
            return self._hidden
        for pattern in (_SIZES_A_MODEL, _ANY_NORM):
            sizes = Counter(
                tensor.shape[0]
                for name, tensor in self.tensors.items()
                if len(tensor.shape) == 1 and len(name) <= LONGEST_NAME and pattern.fullmatch(name)
            )
            if sizes:
                return sizes.most_common(1)[0][0]
        return None

    def _table(self, name: str) -> Rule | None:
        if len(name) > LONGEST_NAME:
            return None
        folded = template(name)  # layers are alike
        if folded not in self._known:
            fitting = (rule for pattern, rule in self._patterns if pattern.fullmatch(name))
            self._known[folded] = next(fitting, None)
        return self._known[folded]

    def _first_layer(self, name: str) -> Rule | None:
        """Halves if the layer has twice the rows that the one behind it has columns."""
        rows = self.tensors[name].shape[0] if self.tensors[name].shape else 0
        for first, second in _PARTNERS:
            head, found, tail = name.rpartition(first)
            if not found:
                continue
            behind = self.tensors.get(head + second + tail.replace("bias", "weight"))
            if behind is not None and len(behind.shape) == 2:
                width = behind.shape[1]
                return GATED if rows == 2 * width else ROWS if rows == width else None
        return None if self.gated is None else GATED if self.gated else ROWS

    def _by_shape(self, shape: Dims) -> Rule | None:
        if len(shape) != 2 or self.hidden is None or (shape[0] == shape[1] == self.hidden):
            return None
        if shape[0] == self.hidden:
            return COLUMNS
        return ROWS if shape[1] == self.hidden else None
