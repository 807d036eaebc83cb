"""Objects that remember how they were made: ``IOMixin`` and ``track_io`` of NeMo 2.

What was passed to a constructor is kept in ``__io__``, a ``fdl.Config``, before the constructor
runs; :func:`reinit` makes the object again from it, and ``io_dump`` writes it down.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Protocol, Self, TypeVar, runtime_checkable

import fiddle as fdl

from bioinit.compat._saved import Artifact, dump, is_known, register
from bioinit.errors import ConfigError

__all__ = [
    "IOMixin",
    "IOProtocol",
    "ReInitProtocol",
    "as_record",
    "is_known",
    "make_known",
    "make_record",
    "reinit",
    "track_io",
    "transform_args",
]

MadeT = TypeVar("MadeT")
MadeT_co = TypeVar("MadeT_co", covariant=True)
_MARK = "__captured_by__"
_FACTORY = "_HAS_DEFAULT_FACTORY_CLASS"
_PLAIN = (str, int, float, tuple, list, dict, bool, type(None))
_making = threading.local()


class CaptureError(ConfigError, RuntimeError):
    """What was passed to a constructor cannot be kept."""


class NotTracked(ConfigError, ValueError):
    """An object that does not know how it was made."""


class NoTarget(ConfigError, TypeError):
    """``track_io`` was called on what is neither a class nor a module."""


@runtime_checkable
class IOProtocol(Protocol[MadeT_co]):
    """Stands in for ``nemo.lightning.io.capture.IOProtocol``: has an ``__io__``."""

    @property
    def __io__(self) -> Any: ...


@runtime_checkable
class ReInitProtocol(Protocol[MadeT_co]):
    """Stands in for ``nemo.lightning.io.capture.ReInitProtocol``: knows how to be made again."""

    def reinit(self) -> MadeT_co: ...


class IOMixin:
    """Stands in for ``nemo.lightning.io.IOMixin``: keeps what its constructor was given.

    What differs: a subclass with a constructor of its own is captured whatever was made before it
    (the original lost its arguments once a parent had been made); ``**kwargs`` are kept one by one
    and not as one argument ``kwargs``; ``*args`` are kept; objects within lists and mappings are
    written as what they were made from, or it is an error: nothing is pickled.
    """

    __io__: fdl.Config[Self]
    __io_artifacts__: ClassVar[Sequence[Artifact[Any]]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        _wrap(cls)
        made = super().__new__
        return made(cls) if made is object.__new__ else made(cls, *args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register(cls)

    def io_transform_args(
        self, init_fn: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """What is kept of the arguments of ``init_fn``; a subclass may change it."""
        return transform_args(self, init_fn, *args, **kwargs)

    def io_init(self, **kwargs: Any) -> fdl.Config[Self]:
        """The ``__io__`` for what ``io_transform_args`` returned; a subclass may change it."""
        return make_record(self, **kwargs)

    @classmethod
    def io_artifacts(cls) -> list[Artifact[Any]]:
        """Which arguments are files that are saved along; none, unless a subclass says so."""
        return []

    def io_dump(self, output: Path | str, yaml_attrs: Iterable[str] = ()) -> None:
        """Write ``io.json`` into the folder ``output``, and ``<name>.yaml`` of some arguments.

        Differs from the original: files appear whole or not at all, an earlier ``io.json`` is
        replaced only then, and ``yaml_attrs`` may be left out.

        Args:
            output: the folder; it is made if need be.
            yaml_attrs: arguments of which every field is to be readable in a file of its own.

        Raises:
            Unwritable: an argument is neither plain data nor tracked.
        """
        dump(self, output, yaml_attrs)


def track_io(
    target: Any, artifacts: Sequence[Artifact[Any]] | None = None, *, names: Iterable[str] = ()
) -> Any:
    """Stands in for ``nemo.lightning.io.track_io``: makes a class keep what it was given.

    What differs: a subclass of a tracked class that is not tracked itself keeps nothing (the
    original kept its parent's arguments under its name).

    Args:
        target: a class; or a module, for every class that is defined in it.
        artifacts: arguments that are files, to be saved along.
        names: other names under which saved files may know the class; not for a module.

    Returns:
        ``target``.

    Raises:
        NoTarget: it is neither; it is a ``TypeError`` too.
    """
    if isinstance(target, ModuleType):
        for kind in list(vars(target).values()):
            home = getattr(kind, "__module__", None) if isinstance(kind, type) else None
            inside = home == target.__name__ or str(home).startswith(f"{target.__name__}.")
            if inside and kind.__dictoffset__:
                track_io(kind, artifacts)
        return target
    if not isinstance(target, type):
        raise NoTarget(
            f"Target must be a module or a class: {target!r:.80} is a {type(target).__name__}. "
            "Call track_io on its class."
        )
    if target in _PLAIN:
        return target
    if not target.__dictoffset__:
        raise NoTarget(
            f"{target.__name__} has __slots__ and no place for an __io__. Add '__dict__' to them."
        )
    _wrap(target)
    register(target, *names)
    if artifacts is not None or "__io_artifacts__" not in target.__dict__:
        target.__io_artifacts__ = list(artifacts or ())  # type: ignore[attr-defined]
    return target


def make_known(value: Any, *names: str) -> Any:
    """Let saved files name a function, an enum or a class, and call it.

    By its own name and by ``names``. What ``io_dump`` wrote as a value files may name, not call.

    This one is ours: the original imported and called whatever a file named.

    Returns:
        ``value``.
    """
    register(value, *names)
    return value


def reinit(configurable: IOProtocol[MadeT]) -> MadeT:
    """Stands in for ``nemo.lightning.io.reinit``: the object, made again from what it was given.

    Raises:
        NotTracked: it has no ``__io__``; it is a ``ValueError`` too.
    """
    if isinstance(configurable, ReInitProtocol):
        return configurable.reinit()  # type: ignore[no-any-return]
    if not hasattr(configurable, "__io__"):
        raise NotTracked(
            f"Cannot reinit {configurable!r:.200} because it does not have a __io__ attribute: "
            f"call track_io({type(configurable).__name__}) before it is made, or derive it from "
            "IOMixin."
        )
    return fdl.build(configurable.__io__)  # type: ignore[no-any-return]


def as_record(value: Any) -> Any:
    """``value`` as ``__io__`` holds it: objects that are tracked and dataclasses as records."""
    record = getattr(value, "__io__", None)
    if isinstance(record, fdl.Buildable):
        if fdl.get_callable(record) is type(value):
            register(type(value))
        return record
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        register(type(value))
        given = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return fdl.Config(type(value), **{name: _inside(item) for name, item in given.items()})
    return value


def _inside(value: Any) -> Any:
    """As :func:`as_record`, in lists and mappings too: a dataclass is a record all through."""
    if type(value) in (list, tuple):
        return type(value)(_inside(item) for item in value)
    if type(value) is dict:
        return {key: _inside(item) for key, item in value.items()}
    return as_record(value)


def transform_args(
    instance: Any, init_fn: Callable[..., Any], *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """The arguments of one call of ``init_fn`` by name, each as ``__io__`` is to hold it."""
    signature = inspect.signature(init_fn)
    bound = signature.bind_partial(instance, *args, **kwargs).arguments
    found: dict[str, Any] = {}
    for name, value in list(bound.items())[1:]:  # the first is the object itself
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        elif signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
            found[name] = tuple(as_record(item) for item in value)
        else:
            found[name] = value
    return {
        name: as_record(value) for name, value in found.items() if type(value).__name__ != _FACTORY
    }


def make_record(instance: Any, **kwargs: Any) -> Any:
    """The ``fdl.Config`` of the class of ``instance`` with these arguments."""
    kind = type(instance)
    places: list[Any] = []
    named = dict(kwargs)
    parameters = inspect.signature(kind).parameters.values()
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    has_rest = isinstance(named.get(rest or ""), tuple) and bool(named[rest or ""])
    for parameter in parameters:
        if parameter.name == rest:
            places.extend(named.pop(rest, ()))
        elif parameter.kind is parameter.POSITIONAL_ONLY or (
            has_rest and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ):
            if parameter.name in named:
                places.append(named.pop(parameter.name))
    try:
        return fdl.Config(kind, *places, **named)
    except (TypeError, ValueError, AttributeError) as error:
        raise CaptureError(
            f"Error creating fdl.Config for {kind.__name__} from {sorted(kwargs)}: {error}. Check "
            "the arguments, or override io_transform_args of the class."
        ) from error


def _wrap(cls: type) -> None:
    """Let ``cls`` keep what its constructor is given, once."""
    current: Any = cls.__init__  # type: ignore[misc]
    original: Callable[..., None] = getattr(current, _MARK, current)
    if original is not current and not _hides_signature(cls):
        return

    @functools.wraps(original)
    def capturing(self: Any, *args: Any, **kwargs: Any) -> None:
        making = _making.__dict__.setdefault("now", [])
        # A parent's constructor, called from a child's: the child's arguments are what was given.
        inner = any(one is self for one in making)
        if inner or getattr(type(self).__init__, _MARK, None) is not original:
            original(self, *args, **kwargs)
            return
        transform: Any = getattr(self, "io_transform_args", functools.partial(transform_args, self))
        make: Any = getattr(self, "io_init", functools.partial(make_record, self))
        object.__setattr__(self, "__io__", make(**transform(original, *args, **kwargs)))
        making.append(self)
        try:
            original(self, *args, **kwargs)
        finally:
            making.pop()

    setattr(capturing, _MARK, original)
    cls.__init__ = capturing  # type: ignore[misc]


def _hides_signature(cls: type) -> bool:
    """Whether ``IOMixin`` stands before the class whose constructor ``cls`` inherits."""
    for base in cls.__mro__:
        if "__init__" in base.__dict__:
            return False
        if base is IOMixin:
            return True
    return False
