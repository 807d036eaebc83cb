"""Live configs that know their record: building them, and reading and setting their fields.

A :class:`Tracked` config remembers the arguments it was made from, whether a record was built, a
person called the class, or an older config was copied with ``dataclasses.replace``. What it
computed from them (derived fields, whatever a person's ``__post_init__`` filled in) is not
remembered as set, so it is computed again whenever something it depends on changes.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING, Any, Self

import fiddle as fdl
import fiddle.history

from bioinit.errors import ConfigError
from bioinit.record.door import coerce, fit, judge, record_of, unknown_field, with_records
from bioinit.record.fields import is_config, same, set_in, specs

# set_hparam sets fields for whoever calls it: the line that fiddle remembers is the caller's.
fdl.history.add_exclude_location(os.path.join("bioinit", "record", "live.py"))


class Tracking:
    """What a live config was made from.

    ``given`` are the arguments, ``values`` what the fields held when last in step with them.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = dict(given)
        self.record: Any = None
        self.values: dict[str, Any] = {}

    def record_for(self, config: Any) -> Any:
        if self.record is None:
            self.record = fdl.Config(type(config))
            for name, value in self.given.items():
                setattr(self.record, name, self._recorded(type(config), name, value))
        return self.record

    def _recorded(self, cls: type, name: str, value: Any) -> Any:
        """What the door would have made of it, where a person gave a list for a tuple."""
        value = with_records(value)
        spec = specs(cls).get(name)
        if spec is None or not isinstance(value, list | set | frozenset):
            return value
        try:
            return fit(spec, value, name)
        except ConfigError:
            return value

    def arguments(self) -> Mapping[str, Any]:
        """What was set, by field, as far as it is known without making a record."""
        if self.record is None:
            return self.given
        return set_in(self.record)

    def note(self, config: Any) -> None:
        self.values = {name: getattr(config, name, None) for name in specs(type(config))}

    def take_over(self, config: Any, source: Tracking) -> None:
        """``config`` was made by ``dataclasses.replace``, which passes every value of the source.

        Those that did not change go back to what they were made from, so that what was computed is
        computed again.
        """
        before = source.arguments()
        for name, spec in specs(type(config)).items():
            if name not in self.given or not same(self.given[name], source.values.get(name)):
                continue
            if name not in before:
                setattr(config, name, spec.default_value())
                del self.given[name]
            elif same(with_records(self.given[name]), with_records(before[name])):
                continue
            elif same(with_records(before[name]), before[name]):  # no config in it
                setattr(config, name, before[name])
                self.given[name] = before[name]


_NO_SOURCE = Tracking({})


def _tracked_post_init(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __post_init__(self: Any, *arguments: Any) -> None:
        called_by_init = bool(arguments) and isinstance(arguments[0], Tracking)
        if called_by_init and arguments[0] is not _NO_SOURCE:
            self._tracking.take_over(self, arguments[0])
        self._settle()
        original(self, *arguments[called_by_init:])
        self._tracking.note(self)

    __post_init__.derives_first = True  # type: ignore[attr-defined]
    return __post_init__


def _nothing(self: Any) -> None:
    pass


@dataclass(kw_only=True)
class Tracked:
    """A config that knows what it was made from. Subclass it as an ordinary dataclass.

    ``dataclasses.replace`` hands every field's value to the class, computed ones too, and passes
    init-only variables along: the one here tells the copy where it comes from.
    """

    if not TYPE_CHECKING:
        _tracking: InitVar[Tracking] = _NO_SOURCE
        __post_init__ = _tracked_post_init(_nothing)
    else:

        def __post_init__(self) -> None: ...

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Found through the whole line of parents: a mixin that knows nothing of us may have it.
        if not hasattr(cls.__post_init__, "derives_first"):
            cls.__post_init__ = _tracked_post_init(cls.__post_init__)  # type: ignore[method-assign]

    def __new__(cls, *arguments: Any, **given: Any) -> Self:
        self = super().__new__(cls)
        given.pop("_tracking", None)
        if arguments:
            # Too many of them is for the constructor to say.
            parameters = [p for p in inspect.signature(cls).parameters if p != "_tracking"]
            given = {**dict(zip(parameters, arguments, strict=False)), **given}
        self.__dict__["_tracking"] = Tracking(given)
        return self

    def _settle(self) -> None:
        """Compute the derived fields. It runs before any ``__post_init__`` of a subclass."""
        for spec in specs(type(self)).values():
            if spec.marks.derive is not None and getattr(self, spec.name) is None:
                try:
                    setattr(self, spec.name, spec.marks.derive(self))
                except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
                    raise ConfigError(
                        f"cannot compute {spec.name} of {type(self).__name__}: {error}. "
                        f"Set {spec.name}, or correct the fields it is computed from."
                    ) from error

    def get_hparam(self, name: str) -> Any:
        """See :func:`get_hparam`."""
        return get_hparam(self, name)

    def set_hparam(self, name: str, value: Any, also_change_value: bool = True) -> None:
        """See :func:`set_hparam`."""
        set_hparam(self, name, value, also_change_value)

    def get_hparams(self) -> dict[str, Any]:
        """See :func:`get_hparams`."""
        return get_hparams(self)

    def get_non_default_hparams(self) -> list[str]:
        """See :func:`get_non_default_hparams`."""
        return get_non_default_hparams(self)


def build(record: Any, *, at: str = "") -> Any:
    """The live config that a record describes. It keeps a copy of the record.

    Raises:
        ConfigError: a field without a default is not set, a value does not fit, or the values
            contradict each other; the message begins with the dotted path, which itself begins
            with ``at``.
    """
    record = copy.deepcopy(record)
    judge(record, at)
    return _build(record, at, {})


def _build(value: Any, at: str, built: dict[int, Any]) -> Any:
    if isinstance(value, fdl.Config):
        if id(value) not in built:
            built[id(value)] = _construct(value, at, built)
        return built[id(value)]
    if isinstance(value, fdl.Buildable):
        return fdl.build(value)
    if type(value) in (tuple, list):
        return type(value)(_build(v, f"{at}.{i}", built) for i, v in enumerate(value))
    if type(value) is dict:
        return {k: _build(v, f"{at}.{k}", built) for k, v in value.items()}
    return value


def _construct(record: Any, at: str, built: dict[int, Any]) -> Any:
    cls = fdl.get_callable(record)
    arguments = {
        name: _build(value, f"{at}.{name}" if at else name, built)
        for name, value in set_in(record).items()
    }
    where = f"{at}: " if at else ""
    if is_config(cls):
        lacking = [s.name for s in specs(cls).values() if s.is_required and s.init]
        lacking = [name for name in lacking if name not in arguments]
        if lacking:
            raise ConfigError(
                f"{where}{cls.__name__} has no default for {', '.join(lacking)}, and nobody set "
                f"it. Set {f'{at}.' if at else ''}{lacking[0]}."
            )
    try:
        live = cls(**arguments)
    except ConfigError as error:
        raise (ConfigError(f"{where}{error}") if where else error) from error.__cause__
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}cannot make a {cls.__name__}: {error}") from error
    if isinstance(live, Tracked):
        live._tracking.record = record  # type: ignore[attr-defined]
    return live


def get_hparam(config: Any, name: str) -> Any:
    """What a config or a record was given for a field: set, or the class's default.

    A nested config comes back as its record. A field that the class itself computes has no other
    value than the live one.

    Raises:
        ConfigError: there is no such field.
    """
    record = record_of(config)
    spec = specs(fdl.get_callable(record)).get(name)
    if spec is None:
        raise ConfigError(unknown_field(fdl.get_callable(record), name))
    if not spec.init:
        return getattr(build(record) if config is record else config, name)
    arguments = set_in(record)
    return arguments[name] if name in arguments else with_records(spec.default_value())


def get_non_default_hparams(config: Any) -> list[str]:
    """The fields that were set, even to a value that equals the default."""
    arguments = set_in(record_of(config))
    return [name for name, value in arguments.items() if not _is_untouched(value)]


def _is_untouched(value: Any) -> bool:
    return isinstance(value, fdl.Config) and all(
        _is_untouched(inner) for inner in set_in(value).values()
    )


def get_hparams(config: Any) -> dict[str, Any]:
    """The fields that were set, with what they were set to; nested configs as records."""
    arguments = set_in(record_of(config))
    return {name: arguments[name] for name in get_non_default_hparams(config)}


def set_hparam(config: Any, name: str, value: Any, also_change_value: bool = True) -> None:
    """Set a field in the record, and (unless told otherwise) in the live config, or in neither.

    The value goes through the same door as a recipe's. Fields that are computed from it are
    computed again. A nested config is kept as its own record.

    Raises:
        ConfigError: there is no such field, it is computed, the value does not fit, or the config
            contradicts itself with it. Nothing has changed then.
    """
    record = record_of(config)
    value = coerce(fdl.get_callable(record), name, value)
    if config is record or not also_change_value:
        setattr(record, name, value)
        return
    before = set_in(record)
    setattr(record, name, value)
    try:
        fresh = _build(record, "", {})
    except ConfigError:
        if name in before:
            setattr(record, name, before[name])
        else:
            delattr(record, name)
        raise
    tracking = config._tracking
    for field in specs(type(config)):
        new = getattr(fresh, field)
        if field == name or not same(new, tracking.values.get(field)):
            setattr(config, field, new)
            tracking.values[field] = new


def changed_behind(config: Any) -> dict[str, tuple[Any, Any]]:
    """Fields that were assigned to directly: what they should hold, and what they do hold."""
    tracking = getattr(config, "_tracking", None)
    if not isinstance(tracking, Tracking):
        return {}
    return {
        name: (value, getattr(config, name))
        for name, value in tracking.values.items()
        if getattr(config, name) is not value and not same(getattr(config, name), value)
    }
