"""Decoders in the worlds of Megatron: what NeMo 2 and 1, Bridge and Megatron-LM call their fields.

A family says once, as a :class:`Gpt`, what is true of its models, and gets a dialect per world.
The tables of those worlds are in :mod:`bioinit.families._worlds`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from bioinit.contexts.protocol import Context
from bioinit.errors import ConfigError
from bioinit.families import _legacy, _megatron
from bioinit.families._fields import Codec, Joint, Only, World
from bioinit.families._joints import Biases, joints
from bioinit.families._kinds import GENERAL, Kind, kind_of
from bioinit.families._runtime import DENSE
from bioinit.families._vocabulary import vocabulary
from bioinit.families._worlds import (
    CODECS,
    DEFAULTS,
    NAMES,
    NEEDED,
    REFUSED,
    REST,
    SAME,
    ZERO_CENTERED,
)
from bioinit.families.protocol import Canonical, Dialect, ReadFields, Written
from bioinit.layout import Dims
from bioinit.mapping import Mapping as Table
from bioinit.record import SavedField
from bioinit.rules import Rule

_YAML = "context/model.yaml"
_NORMS = "this family has norms of one kind"
_GATES = "this family has MLPs of one kind"


@dataclass(frozen=True, kw_only=True)
class Gpt:
    """What is true of a family of decoders in every world of Megatron.

    ``classes`` are NeMo 2's config classes by their short names with what they set, the general one
    first, and ``bridge`` likewise; ``at`` is the module of the former, ``at_bridge`` that of the
    latter. ``config_class`` picks the class that is written. ``fits`` says whether a config of no
    class in particular describes this family. What a world has besides goes into ``names`` (theirs
    to ours), ``joint`` and ``only``, by the world's name; Bridge has what NeMo 2 has. A family's
    joint takes the place of a common one that shares a field with it. ``lacks`` are fields of ours
    that no world of Megatron has a word for, with the values that need none.
    """

    tensors: Callable[[Any], Mapping[str, Canonical]]
    gated: bool
    normalization: str
    fits: Callable[[Kind], bool]
    at: str
    classes: Mapping[str, Mapping[str, Any]]
    model: str
    at_bridge: str
    bridge: Mapping[str, Mapping[str, Any]]
    config_class: Callable[[Any], str]
    is_zero_centered: bool = False
    has_biases: Biases = "none"
    """Which linear layers may have biases. ``all``: our fields are ``add_attention_bias`` and
    ``add_mlp_bias``; ``qkv``: it is ``add_qkv_bias``."""
    scales: bool = False
    """Whether NeMo 2's class knows the rotary scaling of Llama 3.1."""
    writes_vocab_size: bool = False
    """Whether NeMo 2's class has had ``vocab_size`` from the beginning."""
    names: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    joint: Mapping[str, tuple[Joint, ...]] = field(default_factory=dict)
    only: Mapping[str, Mapping[str, Only]] = field(default_factory=dict)
    lacks: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    codecs: Mapping[str, Codec] = field(default_factory=dict)
    layers: Callable[[Any], Collection[Rule]] = lambda config: ()
    """More rules for one layer, with names in full."""
    norms: Callable[[Any, float], Collection[Rule]] = lambda config, add: ()
    """More norms of one layer; the second argument is what is added to stored weights."""
    check: Callable[[Any], None] = lambda config: None
    """Raises for a config that NeMo 2 cannot express, where no single field says so."""
    mlp: Callable[[Any], Sequence[Rule]] | None = None
    """The rules for one layer's MLP, where it is another than ``gated`` says."""
    ignored: Mapping[str, str] = DENSE
    """Reasons for fields that describe no model."""

    def dialects(self) -> dict[str, Dialect]:
        """One per world: ``nemo2``, ``nemo1``, ``bridge`` and ``megatron``."""
        worlds = {name: self.world(name) for name in ("nemo2", "nemo1", "bridge", "megatron")}
        return {name: self._dialect(world) for name, world in worlds.items()}

    def rules(self, config: Any, shapes: Mapping[str, Dims], body: str) -> list[Rule]:
        """The table of all four worlds.

        A checkpoint that is read, or a live model, may have norms around one where ours are around
        zero; what is to be written (there are no shapes yet) has them as ours are.
        """
        is_read = len(shapes) > 0
        is_around_one = self.is_zero_centered and not getattr(config, ZERO_CENTERED)
        add = -1.0 if is_read and is_around_one else 0.0
        layers = (*self.layers(config), *self.norms(config, add))
        more = [_megatron.both(rule) for rule in layers]
        return [
            *_megatron.gpt(
                config,
                shapes,
                gated=self.gated,
                mlp_rules=None if self.mlp is None else self.mlp(config),
                add=add,
            ),
            *(rule for pair in more for rule in pair),
            *_legacy.rules(config, shapes, gated=self.gated, add=add),
        ]

    def world(self, dialect: str) -> World:
        """The fields of this family in one world."""
        like = "nemo2" if dialect == "bridge" else dialect
        names = {**{name: name for name in SAME}, **NAMES[like], **self.names.get(like, {})}
        own = self.joint.get(like, ())
        common = joints(
            like,
            gated=self.gated,
            normalization=self.normalization,
            is_zero_centered=self.is_zero_centered,
            has_biases=self.has_biases,
            scales=self.scales,
        )
        replaced = {name for one in own for name in one.theirs}
        joint = (*(one for one in common if replaced.isdisjoint(one.theirs)), *own)
        taken = {*names, *(name for one in joint for name in one.theirs)}
        only = {**REFUSED[like], **self.only.get(like, {})}
        twice = sorted(taken.intersection(self.only.get(like, {})))
        if twice:
            raise ConfigError(
                f"{', '.join(twice)} of {like} cannot have one meaning alone: a name or a joint "
                "reads it already. Leave it out of `only`, or give a joint of the family's own."
            )
        if like == "nemo2":
            only |= {
                "normalization": Only((self.normalization,), _NORMS),
                "gated_linear_unit": Only((self.gated,), _GATES),
            }
        return World(
            dialect=dialect,
            names=names,
            codecs={**CODECS.get(like, {}), **self.codecs},
            only={name: one for name, one in only.items() if name not in taken},
            lacks=self.lacks,
            ignored=self.ignored,
            defaults={} if like == "nemo2" else DEFAULTS[like],
            joint=joint,
            needed=NEEDED,
            rest=REST if dialect == "megatron" else "",
        )

    def _dialect(self, world: World) -> Dialect:
        def read(context: Context, shapes: Mapping[str, Dims] | None = None) -> ReadFields:
            _check_version(context)
            known, said = vocabulary(context, shapes or {})
            result = world.read(context, known, self._defaults(context))
            return ReadFields(_whole(result.fields), (*result.account, *said))

        joint = {name: ", ".join(one.ours) for one in world.joint for name in one.theirs}
        return Dialect(
            rules=self.rules,
            spells=_megatron.spells("decoder", is_legacy=world.dialect in ("nemo1", "megatron")),
            recognizes=lambda context: self._recognizes(world.dialect, context),
            read=read,
            write=self._writer(world) if world.dialect == "nemo2" else None,
            fields={**world.names, **joint},
            says=world.says,
        )

    def _recognizes(self, dialect: str, context: Context) -> bool:
        if context.dialect != dialect:
            return False
        named = (context.raw or {}).get("canonical") if dialect in ("nemo2", "bridge") else None
        if named in (f"{self.at}.{next(iter(self.classes))}", self._bridge_class()):
            return True
        if named is not None and named not in GENERAL:
            return False
        found = kind_of(context)
        return found is not None and self.fits(found)

    def _bridge_class(self) -> str:
        return f"{self.at_bridge}.{next(iter(self.bridge))}"

    def _defaults(self, context: Context) -> Mapping[str, Any]:
        """What the class that the context names sets where the context is silent."""
        classes = {"nemo2": self.classes, "bridge": self.bridge}.get(context.dialect)
        if classes is None:
            return {}
        short = (context.model or "").rpartition(".")[2]
        general = next(iter(classes.values()))
        is_ours = (context.raw or {}).get("canonical") not in GENERAL
        return {
            **DEFAULTS["nemo2"],
            **(general if is_ours else {}),
            **classes.get(short, {}),
        }

    def _writer(self, world: World) -> Any:
        def write(config: Any, carried: Mapping[str, Any], tokenizer: Collection[str]) -> Written:
            from bioinit.families import _nemo2

            _check_extra(config)
            self.check(config)
            fields, account = world.write(config, carried)
            spelled = Table(self.rules(config, {}, "")).spelled_out(
                {key: tensor.shape for key, tensor in self.tensors(config).items()}
            )
            fields["activation_func"] = _nemo2.Ref(fields["activation_func"])
            vocab_size = fields["vocab_size"]
            if not self.writes_vocab_size:  # added to the other classes in NeMo 2.3
                del fields["vocab_size"]
            written = _nemo2.written(
                fields,
                config_class=self.config_class(config),
                model_class=self.model,
                keys=tuple(spelled),
                num_layers=config.num_layers,
                tokenizer=tokenizer,
                num_experts=getattr(config, "num_moe_experts", 0),
            )
            return written._replace(account=account, files=_said(written.files, vocab_size))

        return write


def _check_version(context: Context) -> None:
    """Raise for a checkpoint of Megatron-LM in which a head's rows lie in an older order.

    Raises:
        ConfigError: it does.
    """
    version = context.tree.get("checkpoint_version")
    if context.dialect == "megatron" and isinstance(version, int | float) and version < 2:
        raise ConfigError(
            f"{context.where} says checkpoint_version={version}, and before 2.0 the queries, keys "
            "and values of a head lay in another order. Load it with Megatron-LM and save it again."
        )


def _check_extra(config: Any) -> None:
    """Raise for what only transformers can do and only ``extra`` says.

    Raises:
        ConfigError: there is such a field.
    """
    rope = config.extra.get("rope_parameters") or {}
    rotated = rope.get("partial_rotary_factor")
    both_ways = config.extra.get("use_bidirectional_attention")
    for name, value, is_usual in (
        ("rope_parameters.partial_rotary_factor", rotated, rotated in (None, 1)),
        ("use_bidirectional_attention", both_ways, not both_ways),
    ):
        if not is_usual:
            raise ConfigError(
                f"{type(config).__name__}.extra.{name} is {value!r}, which nemo2 cannot express: "
                "hf alone has it. Convert to another dialect, or change the field if the model was "
                "not trained with it."
            )


def _whole(fields: Mapping[str, SavedField]) -> dict[str, SavedField]:
    """``fields``, with what Megatron makes of those that nobody says."""
    found = dict(fields)
    hidden, heads = found["hidden_size"], found["num_attention_heads"]
    made = {
        "ffn_hidden_size": (4 * hidden.value, f"4 * {hidden.where}"),
        "num_query_groups": (heads.value, heads.where),
        "kv_channels": (hidden.value // max(heads.value, 1), f"{hidden.where} / {heads.where}"),
    }
    for name, (value, where) in made.items():
        if name not in found or found[name].value is None:
            found[name] = SavedField(value, False, where)
    return found


def _said(files: Mapping[str, bytes], vocab_size: int) -> dict[str, bytes]:
    """``files``, with the true vocabulary in the one of them that only people and we read."""
    tree = yaml.safe_load(files[_YAML])
    tree["config"]["vocab_size"] = vocab_size
    shown = yaml.safe_dump(tree, sort_keys=True, allow_unicode=True, width=100)
    return {**files, _YAML: shown.encode()}
