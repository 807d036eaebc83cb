"""Configs and tensors under names of our own, over a transformers model.

A named family declares two tables: which field of ours is which field of ``config.json``, and what
each tensor of the ``hf`` dialect is called in the family's canonical space. Both are read in either
direction; there is no second table for the way back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import nn

from bioinit.backends.transformers import architectures, configs, imported
from bioinit.errors import ConfigError
from bioinit.keys import Pattern
from bioinit.layout import Dims, numel
from bioinit.record import SavedField
from bioinit.rules import Part, Rule, Unflatten

EXTRA = "extra"
"""The field of ours that carries what only transformers reads."""

_NOTHING = object()

_REFUSED = {
    "auto_map": "names code that transformers would run",
    "quantization_config": "says that weights are quantized, which they are not",
}
"""What no ``config.json`` of ours says, whoever asks for it."""


class Fate(NamedTuple):
    """What became of one field of ``config.json``: mapped, carried, ignored or unknown; and how."""

    name: str
    fate: Literal["mapped", "carried", "ignored", "unknown"]
    note: str


@dataclass(frozen=True)
class Translation:
    """Fields of ``config.json`` for ``model_type``, by our names.

    ``names`` maps theirs to ours; ``rope_parameters.rope_theta`` is an entry of a dict. ``values``
    gives, for a field of ours, our word for each of theirs. ``only`` are undeclared fields with the
    one value that transformers still supports, ``idle`` undeclared ones that checkpoints have and
    no code reads.
    """

    model_type: str
    names: Mapping[str, str]
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()

    def read(
        self, data: Mapping[str, Any], where: str
    ) -> tuple[dict[str, SavedField], tuple[Fate, ...]]:
        """The saved config in our fields, and the fate of every field that it had.

        Raises:
            ConfigError: a value that transformers refuses, or that this family has no word for.
        """
        saved = configs.read(architectures.config_class(self.model_type), data)
        fields = {
            ours: SavedField(
                self._our_word(ours, _at(saved.values, theirs), where),
                theirs.partition(".")[0] in saved.literal,
                f"{where}: {theirs}",
            )
            for theirs, ours in self.names.items()
        }
        extra: dict[str, Any] = {}
        fates: list[Fate] = []
        for name, now in saved.became.items():
            if name == "architectures" or isinstance(now, str):
                note = "model.architecture decides" if name == "architectures" else str(now)
                fates.append(Fate(name, "ignored", note))
            elif name in self.only:
                self._check_only(name, data[name], where)
                fates.append(Fate(name, "ignored", f"{data[name]!r} is the only kind there is"))
            elif name in saved.undeclared:
                extra[name] = saved.undeclared[name]
                is_idle = name in self.idle
                note = "no code reads it" if is_idle else f"not a field of {saved.cls.__name__}"
                fates.append(Fate(name, "carried" if is_idle else "unknown", note))
            else:
                became: list[str] = []
                for theirs in now:
                    rest = self._rest(saved, theirs)
                    if rest is not _NOTHING:
                        extra[theirs] = rest
                    became += self._ours(theirs)
                    became += [] if rest is _NOTHING else [f"{EXTRA}.{theirs}"]
                carried = all(ours.startswith(f"{EXTRA}.") for ours in became)
                fates.append(Fate(name, "carried" if carried else "mapped", ", ".join(became)))
        fields[EXTRA] = SavedField(extra, bool(extra), where)
        return fields, tuple(fates)

    def write(self, config: Any) -> dict[str, Any]:
        """The fields that transformers' config class takes, for a config of ours."""
        found = dict(getattr(config, EXTRA))
        for theirs, ours in self.names.items():
            value = getattr(config, ours)
            words = {our: their for their, our in self.values.get(ours, {}).items()}
            root, _, entry = theirs.partition(".")
            value = words.get(value, value)
            if not entry:
                found[theirs] = value
            elif value is not None:
                found[root] = {**(found.get(root) or {}), entry: value}
        head = architectures.head_fields(config.architecture, config.num_labels, config.labels)
        return {**found, **head}

    def make(self, config: Any) -> Any:
        """The transformers config object for a config of ours."""
        return architectures.make_config(
            architectures.config_class(self.model_type), self.write(config)
        )

    def construct(self, config: Any) -> nn.Module:
        """The transformers model for a config of ours."""
        return architectures.construct(self.model_class(config), self.make(config))

    def model_class(self, config: Any) -> Any:
        """The transformers class that ``config.architecture`` means.

        Raises:
            ConfigError: there is none, or its tensors are not in the family's table.
        """
        cls = architectures.model_class(self.model_type, config.architecture)
        known = architectures.names(self.model_type)
        if cls.__name__ not in known:
            raise ConfigError(
                f"model.architecture={config.architecture!r} is outside this family, which has "
                f"{', '.join(known)}. Use a recipe of the family auto."
            )
        return cls

    def body(self, config: Any) -> str:
        """What stands before the names of the body in the model of ``config``."""
        cls = self.model_class(config)
        bare = imported().MODEL_MAPPING[architectures.config_class(self.model_type)]
        return "" if cls is bare else f"{cls.base_model_prefix}."

    def written(self, config: Any) -> bytes:
        """``config.json`` for a config of ours, as transformers writes it."""
        made = self.make(config)
        made.architectures = [self.model_class(config).__name__]
        return bytes(made.to_json_string(), "utf-8")

    def check_extra(self, extra: Mapping[str, Any]) -> None:
        """Raise for an entry of ``extra`` that is a field of ours by another name, or refused."""
        for name in extra:
            if name in self.names:
                raise ConfigError(
                    f"model.{EXTRA}.{name} is called model.{self.names[name]} here. Set that."
                )
            if name in _REFUSED:
                raise ConfigError(
                    f"model.{EXTRA}.{name} {_REFUSED[name]}. Leave it out; if it was carried along "
                    "in context/bioinit.json, take it out of there."
                )

    def _our_word(self, ours: str, value: Any, where: str) -> Any:
        words = self.values.get(ours)
        if words is None or value in words.values():
            return value
        if value not in words:
            raise ConfigError(
                f"{where} says {ours}={value!r}; known are {', '.join(map(repr, words))}. "
                "If transformers has this kind, use a recipe of the family auto."
            )
        return words[value]

    def _check_only(self, name: str, value: Any, where: str) -> None:
        if value not in (None, self.only[name]):
            raise ConfigError(
                f"{where} says {name}={value!r}, which transformers no longer builds: it knows "
                f"{self.only[name]!r} only. Use the version of transformers that wrote it."
            )

    def _ours(self, name: str) -> list[str]:
        """The fields of ours that ``name`` of theirs, or its entries, are."""
        return [
            ours
            for theirs, ours in self.names.items()
            if name in (theirs, theirs.partition(".")[0])
        ]

    def _rest(self, saved: configs.SavedConfig, name: str) -> Any:
        """What of the value of ``name`` is no field of ours."""
        if name in self.names:
            return _NOTHING
        if name in saved.nested:
            return configs.plain(saved.nested[name].values)
        value = saved.values[name]
        if not self._ours(name) or not isinstance(value, Mapping):
            return _NOTHING if value is None and self._ours(name) else value
        rest = {key: inner for key, inner in value.items() if f"{name}.{key}" not in self.names}
        return rest or _NOTHING


class Heads(NamedTuple):
    """How the rows of attention are factored: groups, query heads per group, channels of one."""

    groups: int
    per_group: int
    channels: int


class Line(NamedTuple):
    """One tensor, or several of one kind: the hf name below the body's prefix, and the canonical.

    ``heads`` factors the first dim, so that a fused or sharded layout can name a head: ``query`` by
    group and head, ``key`` (and value) by group. ``aliases`` are other spellings that names have.
    A world without the tensor means zeros where ``zero`` is set.
    """

    hf: str
    canonical: str
    is_body: bool = True
    heads: Literal["", "query", "key"] = ""
    aliases: tuple[str, ...] = ()
    zero: bool = False


def norm(hf: str, canonical: str, *, is_body: bool = True) -> tuple[Line, Line]:
    """A layer norm, which older checkpoints store as ``gamma`` and ``beta``."""
    return (
        Line(f"{hf}.weight", f"{canonical}.weight", is_body, aliases=(f"{hf}.gamma",)),
        Line(f"{hf}.bias", f"{canonical}.bias", is_body, aliases=(f"{hf}.beta",)),
    )


def linear(
    hf: str,
    canonical: str,
    *,
    is_body: bool = True,
    heads: Literal["", "query", "key"] = "",
) -> tuple[Line, Line]:
    """A linear layer's weight and bias."""
    return (
        Line(f"{hf}.weight", f"{canonical}.weight", is_body, heads),
        Line(f"{hf}.bias", f"{canonical}.bias", is_body, heads),
    )


def body_of(model: nn.Module) -> str:
    """What stands before the names of the body in a live transformers model."""
    whole: Any = model
    return "" if whole.base_model is model else f"{whole.base_model_prefix}."


def rules(
    lines: Sequence[Line], body: str, shapes: Mapping[str, Dims], heads: Heads
) -> Iterator[Rule]:
    """The table of ``lines``; aliases come after every spelling that is written."""
    spellings = [(line, line.hf) for line in lines]
    spellings += [(line, alias) for line in lines for alias in line.aliases]
    for line, spelling in spellings:
        key = (body if line.is_body else "") + spelling
        if not line.heads:
            yield Rule(key, (Part(line.canonical),), zero=line.zero)
            continue
        outer = (heads.groups, heads.per_group if line.heads == "query" else 1)
        pattern = Pattern(key)
        rows = next((shapes[k][0] for k in pattern.matching(shapes) if shapes[k]), None)
        # A shape that the heads do not divide differs from the model's, and shows as that.
        sizes = (*outer, heads.channels)
        if rows is not None and rows != numel(sizes):
            sizes = (*outer, rows // numel(outer)) if rows % numel(outer) == 0 else (rows, 1, 1)
        yield Rule(key, (Part(line.canonical, (Unflatten(0, sizes),)),))


def _at(values: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    root, _, entry = path.partition(".")
    value = values[root]
    if not entry:
        return value
    return value.get(entry) if isinstance(value, Mapping) else None


_SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "seq_length",
    "make_vocab_size_divisible_by",
    "model_parallel_size",
    "num_moe_experts",
)


def check_sizes(config: Any) -> None:
    """Raise for a count or a width of nothing.

    Raises:
        ConfigError: there is one.
    """
    for name in _SIZES:
        value = getattr(config, name, None)
        if isinstance(value, int) and value < 1:
            raise ConfigError(
                f"{type(config).__name__}.{name} is {value}, and no model has less than 1. "
                "Correct it in the recipe, or in the saved config if it stands there."
            )


def checked_heads(config: Any) -> None:
    """Raise if attention heads do not divide the hidden size, as transformers needs it.

    Raises:
        ConfigError: they do not, or a size is none.
    """
    check_sizes(config)
    hidden, heads, channels = config.hidden_size, config.num_attention_heads, config.kv_channels
    if heads < 1 or hidden != heads * channels:
        raise ConfigError(
            f"hidden_size={hidden} is not num_attention_heads={heads} times kv_channels="
            f"{channels}. Correct one of them; kv_channels is derived when it is left out."
        )
