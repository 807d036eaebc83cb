"""What fields a config class has, and what is declared about each of them.

A config is a keyword-only dataclass. Beyond a type and a default, a field may say:

    initial_ckpt_path: str | None = own(None)                     # never taken from a checkpoint
    kv_channels: int | None = derived(lambda c: c.hidden_size // c.num_attention_heads)
    num_layers: int = renamed_from("n_layers", default=12)        # its name in older contexts
    activation: Callable = one_of(squared_relu, my_gelu)          # functions a file may name
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Literal, NamedTuple

from bioinit.errors import ConfigError

Setter = Literal["default", "checkpoint", "recipe", "command line"]
_MARKS = "bioinit"


@dataclass(frozen=True, slots=True)
class Origin:
    """Who gave a field its value, and where it is written.

    ``by`` is ``default`` for a class's own default and for a preset that nobody chose by name.
    """

    by: Setter
    where: str = ""

    @property
    def is_person(self) -> bool:
        """Whether a person wrote the value: in a recipe, in Python or on the command line."""
        return self.by in ("recipe", "command line")

    def __str__(self) -> str:
        return f"{self.by}, {self.where}" if self.where else self.by


class SavedField(NamedTuple):
    """The value a checkpoint's own config gives to one field of ours.

    ``literal`` says that it is written in the saved config; otherwise it is the default of the
    class that wrote it. ``where`` names the file and the field there, for messages.
    """

    value: Any
    literal: bool
    where: str


@dataclass(frozen=True)
class Marks:
    """What a field declares beside its type and its default."""

    own: bool = False
    derive: Callable[[Any], Any] | None = None
    renamed_from: tuple[str, ...] = ()
    choices: tuple[Any, ...] = ()
    bookkeeping: bool = False
    any_config: bool = False
    """The field holds a config of a class that only the reader of a file knows."""


def marked(
    marks: Marks, *, default: Any = MISSING, default_factory: Any = MISSING, **options: Any
) -> Any:
    """A dataclass field that carries ``marks``; for several marks at once."""
    return dataclasses.field(
        default=default, default_factory=default_factory, metadata={_MARKS: marks}, **options
    )


def own(default: Any = MISSING, *, default_factory: Any = MISSING) -> Any:
    """A field that belongs to this run: never taken from a checkpoint, never in conflict."""
    return marked(Marks(own=True), default=default, default_factory=default_factory)


def derived(derive: Callable[[Any], Any], *, own: bool = False) -> Any:
    """A field whose ``None`` means "compute it": ``derive`` gets the config and returns the value.

    It is computed again whenever what it depends on changes. Derived fields are computed in the
    order of their definition, before a person's own ``__post_init__`` runs.
    """
    return marked(Marks(derive=derive, own=own), default=None)


def renamed_from(*names: str, default: Any = MISSING, default_factory: Any = MISSING) -> Any:
    """A field that older saved contexts call by one of ``names``."""
    return marked(Marks(renamed_from=names), default=default, default_factory=default_factory)


def one_of(default: Any, *others: Any) -> Any:
    """A field that holds a function or a class, and which ones a saved context may name.

    The activations of ``torch.nn.functional`` need no mention.
    """
    return marked(Marks(choices=(default, *others)), default=default)


def bookkeeping(default_factory: Callable[[], Any]) -> Any:
    """A field that is about the run and no setting of it: nobody may set it from outside."""
    return marked(Marks(own=True, bookkeeping=True), default_factory=default_factory)


def any_config() -> Any:
    """A field for a config of a class that only whoever reads a file knows; None by default."""
    return marked(Marks(any_config=True), default=None)


@dataclass(frozen=True)
class Spec:
    """One field of a config class, its annotation resolved."""

    name: str
    annotation: Any
    init: bool
    default: Any
    default_factory: Any
    marks: Marks

    @property
    def is_required(self) -> bool:
        return self.default is MISSING and self.default_factory is MISSING

    def default_value(self) -> Any:
        """The class's own default; a fresh one from a factory, None where there is none."""
        if self.default is not MISSING:
            return self.default
        return self.default_factory() if self.default_factory is not MISSING else None

    @property
    def choices(self) -> tuple[Any, ...]:
        """Functions and classes that a file may name for this field."""
        usual = (self.default,) if callable(self.default) else ()
        return (*self.marks.choices, *usual)


def specs(cls: type) -> Mapping[str, Spec]:
    """The fields of a config class by name, in the order of their definition.

    Raises:
        ConfigError: it is no dataclass.
    """
    return _specs(cls)


@functools.lru_cache(maxsize=512)
def _specs(cls: Any) -> Mapping[str, Spec]:
    if not dataclasses.is_dataclass(cls):
        raise ConfigError(f"{label(cls)} is no dataclass. Decorate it: @dataclass(kw_only=True).")
    hints = _hints(cls)
    return {
        f.name: Spec(
            f.name,
            hints[f.name],
            f.init,
            f.default,
            f.default_factory,
            f.metadata.get(_MARKS, Marks()),
        )
        for f in dataclasses.fields(cls)
    }


@dataclass(frozen=True)
class Unresolved:
    """An annotation that names something which its module does not have when it runs."""

    text: str
    reason: str


def _hints(cls: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except NameError:
        pass
    found: dict[str, Any] = {}
    for owner in reversed(cls.__mro__):
        for name, annotation in inspect.get_annotations(owner).items():
            alone = {"__annotations__": {name: annotation}, "__module__": owner.__module__}
            try:
                found |= typing.get_type_hints(type("_", (), alone), include_extras=True)
            except NameError as error:
                found[name] = Unresolved(str(annotation), str(error))
    return found


def mentioned(annotation: Any) -> Iterator[Any]:
    """Every plain type that values of an annotation consist of, itself if it is one."""
    arguments = typing.get_args(annotation)
    if not arguments:
        yield annotation
    if typing.get_origin(annotation) not in (Literal, collections.abc.Callable, type):
        for argument in arguments:
            yield from mentioned(argument)


def config_types(annotation: Any) -> tuple[type, ...]:
    """The config classes that an annotation mentions."""
    return tuple(t for t in mentioned(annotation) if isinstance(t, type) and is_config(t))


def enum_types(annotation: Any) -> tuple[type[enum.Enum], ...]:
    """The enums that an annotation mentions."""
    plain = (t for t in mentioned(annotation) if isinstance(t, type))
    return tuple(t for t in plain if issubclass(t, enum.Enum))


def is_config(value: Any) -> bool:
    """Whether ``value`` is a dataclass, or an instance of one."""
    return dataclasses.is_dataclass(value)


def label(cls: Any) -> str:
    """How files and messages call a class or a function. It is never used to import one."""
    return f"{getattr(cls, '__module__', '?')}.{getattr(cls, '__qualname__', repr(cls))}"


def set_in(record: Any) -> dict[str, Any]:
    """The fields that are set in a record, in the order of their definition."""
    arguments: dict[str, Any] = record.__arguments__
    cls = record.__fn_or_cls__
    if not is_config(cls):
        return dict(arguments)
    return {name: arguments[name] for name in specs(cls) if name in arguments}


def same(one: Any, other: Any) -> bool:
    """Whether two field values are equal and of one type: ``1``, ``1.0`` and ``True`` differ."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    try:
        return bool(one == other)
    except (TypeError, ValueError, RuntimeError):  # arrays and tensors refuse to be a bool
        return False
