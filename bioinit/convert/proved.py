"""What stored shapes prove of a model that no saved config describes whole, and what they cannot.

Two models of the same shapes can compute different things: how many heads share a matrix, how
positions are rotated. Nobody's default is a fair guess for that, so it is asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING
from typing import Any

from bioinit.config import TrainableModelConfig
from bioinit.contexts.protocol import Context
from bioinit.errors import ConfigError, MappingError
from bioinit.families.protocol import Dialect, Family
from bioinit.keys import numbers, template
from bioinit.layout import Box, Dims
from bioinit.mapping import Mapping as Table
from bioinit.record import SavedField, Spec, build, make_record, specs

_FRONTS = 4
_WORD = "embedding.word_embeddings.weight"
_POSITION = "embedding.position_embeddings.weight"
_SECOND = ".mlp.linear_fc2.weight"
_SECONDS = ".mlp.experts.*.linear_fc2.weight"
_ONLY_TRAINING = frozenset(
    {
        "hidden_dropout",
        "attention_dropout",
        "classifier_dropout",
        "init_method_std",
        "make_vocab_size_divisible_by",
        "model_parallel_size",
        "moe_aux_loss_coeff",
        "moe_input_jitter_eps",
    }
)
"""Fields on which no output of a trained model depends."""
_NAMES_TELL = frozenset({"add_attention_bias", "add_mlp_bias", "attention_bias"})
"""Fields with which stored names do not fit if they are wrong."""
_ONLY_STORED = "layernorm_zero_centered_gamma"
"""Says how weights are stored, outside of the hf dialect."""


class Unstated(ConfigError):
    """Nobody states ``fields``, which decide what a model computes; ``what`` says so of it."""

    def __init__(self, what: str, fields: Collection[str]) -> None:
        sets = " ".join(f"--set {name}=VALUE" for name in fields)
        super().__init__(
            f"{what} Give the model's config with --config FILE, or each of these fields: {sets}."
        )
        self.what = what
        self.fields = tuple(fields)


def is_whole(context: Context | None) -> bool:
    """Whether what the saved config leaves out has a known value.

    Of GPT-NeoX's arguments DeepSpeed keeps a selection beside the weights; only a YAML file has
    all that is not a default.
    """
    if context is None:
        return False
    is_yaml = isinstance(context.raw, Mapping) and "said" in context.raw
    return context.dialect != "neox" or is_yaml


def proved(
    family: Family,
    dialect: str,
    cls: type[TrainableModelConfig],
    architecture: str | None,
    shapes: Mapping[str, Dims],
) -> dict[str, SavedField]:
    """The sizes that stored shapes leave no choice about."""
    if dialect not in family.dialects:
        return {}
    known = specs(cls)
    found: dict[str, SavedField] = {}
    layers: set[int] = set()
    experts: set[int] = set()
    raw = {} if architecture is None else {"architecture": architecture}
    config: TrainableModelConfig = build(make_record(cls, raw, {}, at="model"), at="model")
    for name, key, box, shape in _placed(family.dialects[dialect], family, config, shapes):
        kind = template(key)
        where = f"the shape {list(shape)} of {name!r}"
        sizes: dict[str, int] = {}
        if key == _WORD:
            sizes = {"vocab_size": shape[0], "hidden_size": shape[1]}
        elif key == _POSITION:
            sizes = {"seq_length": shape[0]}
        elif kind.endswith((_SECOND, _SECONDS)) and len(box.sizes) == 2:
            sizes = {"hidden_size": box.sizes[0], "ffn_hidden_size": box.sizes[1]}
            path = [int(number) for number in numbers(key)]
            layers.add(path[0])
            experts.update(path[1:])
        for field, size in sizes.items():
            if field in known:
                found.setdefault(field, SavedField(size, False, where))
    counts = {"num_layers": layers, "num_moe_experts": experts}
    for field, seen in counts.items():
        if field in known and seen == set(range(len(seen))) and seen:
            found[field] = SavedField(len(seen), False, "the stored names")
    return found


def _placed(
    dialect: Dialect,
    family: Family,
    config: TrainableModelConfig,
    shapes: Mapping[str, Dims],
) -> Iterator[tuple[str, str, Box, Dims]]:
    """Stored names, whatever stands in front of them, with the canonical tensors they hold."""
    table = Table(dialect.rules(config, shapes, family.body(config)))
    for name, shape in shapes.items():
        if len(shape) < 2:
            continue
        parts = name.split(".")
        for first in range(min(_FRONTS, len(parts))):
            try:
                placed = table.place(".".join(parts[first:]), (Box.contiguous(shape),))
            except MappingError:  # the heads are not those of the class's defaults
                break
            if placed is not None:
                yield from ((name, key, box, shape) for key, box, _ in placed)
                break


def require_stated(
    cls: type[TrainableModelConfig],
    stated: Collection[str],
    proved: Mapping[str, SavedField],
    dialect: str,
    who: str,
) -> tuple[str, ...]:
    """What a person should know of the fields that nobody states, if none of them is in doubt.

    Raises:
        Unstated: fields that shapes do not prove and that decide what the model computes.
    """
    settled = {*stated, *_NAMES_TELL}
    unsaid = {n: s for n, s in specs(cls).items() if n not in settled and _has_default(s)}
    harmless = _ONLY_TRAINING | ({_ONLY_STORED} if dialect == "hf" else set())
    asked = [name for name in unsaid if name not in harmless]
    shown = _values({name: field.value for name, field in proved.items()})
    if asked:
        by_shapes = f" Stored shapes prove {shown}." if shown else ""
        raise Unstated(
            f"{who}, and shapes do not prove how the model computes: nobody states "
            f"{', '.join(asked)}.{by_shapes}",
            asked,
        )
    notes = [f"stored shapes prove {shown}"] if shown else []
    assumed = _values({name: unsaid[name].default for name in unsaid})
    if assumed:
        notes.append(f"assumed {assumed} (default of {cls.__name__}; no output depends on it)")
    return tuple(notes)


def _has_default(spec: Spec) -> bool:
    """Whether the class has a value of its own for it, and not one that follows from others."""
    is_given = spec.default is not None and spec.default is not MISSING
    marks = spec.marks
    return spec.init and is_given and not (marks.own or marks.derive or marks.bookkeeping)


def _values(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items())
