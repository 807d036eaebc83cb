"""Settings that can be changed after a config was made, and are saved as changed.

Stands in for ``bionemo.llm.utils.iomixin_utils``. A config of this kind has two layers: the
*hyper-parameters*, which are the arguments it would be made from again (and is saved as), and its
attributes, which its ``__post_init__`` may have worked on.
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from typing import Any

import fiddle as fdl

from bioinit.compat._capture import IOMixin, as_record
from bioinit.errors import ConfigError
from bioinit.keys import suggestion


class UnknownHparam(ConfigError, KeyError):
    """A hyper-parameter was asked for that the config's constructor does not have."""

    __str__ = Exception.__str__


class UnsettableHparam(ConfigError, AttributeError):
    """A hyper-parameter was to be set that the config's constructor does not take."""


class WillHaveGetSetHparam(ABC):
    """Says that a class further down will be able to change its hyper-parameters.

    A base of configs inherits from this, so that it may call :meth:`set_hparam`, and only the leaf
    class mixes in :class:`IOMixinWithGettersSetters`. Stands in for
    ``bionemo.llm.utils.iomixin_utils.WillHaveGetSetHparam``.
    """

    @abstractmethod
    def set_hparam(self, attribute: str, value: Any, also_change_value: bool = True) -> None:
        """Set the hyper-parameter ``attribute``, and the attribute unless told otherwise."""
        raise NotImplementedError

    @abstractmethod
    def get_hparam(self, attribute: str) -> Any:
        """Give the hyper-parameter ``attribute``."""
        raise NotImplementedError

    @abstractmethod
    def get_hparams(self) -> dict[str, Any]:
        """Give the hyper-parameters that were set, by name."""
        raise NotImplementedError


class IOMixinWithGettersSetters(WillHaveGetSetHparam, IOMixin):
    """Remembers how it was made, and lets that be changed. Mix it into leaf classes.

    Stands in for ``bionemo.llm.utils.iomixin_utils.IOMixinWithGettersSetters``. Different here: a
    name that the constructor does not have changes nothing at all; an object that is set is kept as
    its own record, so that it can be saved; a field that was left to its ``default_factory`` has
    a hyper-parameter like any other, a fresh value of that factory.
    """

    def set_hparam(self, attribute: str, value: Any, also_change_value: bool = True) -> None:
        """Set the hyper-parameter ``attribute``, and the attribute unless told otherwise.

        Raises:
            UnsettableHparam: the constructor has no such parameter. It is an ``AttributeError``.
        """
        record = hparams_of(self)
        names = parameters(record)
        if attribute not in names and not takes_anything(record):
            raise UnsettableHparam(
                f"No parameter named {attribute!r} exists for {type(self).__name__}, so it cannot "
                f"be set. {suggestion(attribute, names)} Valid parameter names: "
                f"{', '.join(names)}."
            )
        kept = as_record(value)
        if also_change_value:
            setattr(self, attribute, value)
        setattr(record, attribute, kept)

    def get_hparam(self, attribute: str) -> Any:
        """The hyper-parameter ``attribute``: what was set, or else the default.

        A config in a config comes back as its record, a ``fiddle.Config``.

        Raises:
            UnknownHparam: the constructor has no such parameter. It is a ``KeyError``.
        """
        return hparam_of(self, attribute)

    def get_non_default_hparams(self) -> list[str]:
        """The hyper-parameters that were set, even to what they would be anyway."""
        return [str(name) for name in hparams_of(self).__arguments__]

    def get_hparams(self) -> dict[str, Any]:
        """The hyper-parameters that were set, by name."""
        return {str(name): value for name, value in hparams_of(self).__arguments__.items()}


def hparams_of(config: Any) -> Any:
    """The record of what ``config`` was made from, a ``fiddle.Config``.

    Raises:
        ConfigError: nobody remembers it.
    """
    record = getattr(config, "__io__", None)
    if not isinstance(record, fdl.Buildable):
        raise ConfigError(
            f"{type(config).__name__} does not remember what it was made from. Mix "
            "IOMixinWithGettersSetters into the leaf class, or call io.track_io on it before an "
            "instance is made."
        )
    return record


def hparam_of(config: Any, name: str) -> Any:
    """What ``config`` was given for ``name``, or the default.

    Raises:
        UnknownHparam: its constructor has no such parameter.
    """
    record = hparams_of(config)
    if name in record.__arguments__:
        return record.__arguments__[name]
    default = _default(record, name)
    if default is inspect.Parameter.empty:
        there = sorted(str(name) for name in record.__arguments__)
        raise UnknownHparam(
            f"Attribute {name!r} not found in hyper-parameters of {type(config).__name__}. "
            f"{suggestion(name, parameters(record))} Options: {there}, and its other parameters."
        )
    return default


def parameters(record: Any) -> dict[str, Any]:
    """The named parameters of what ``record`` makes, and their defaults."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    found = record.__signature_info__.parameters
    return {name: p.default for name, p in found.items() if p.kind not in kinds}


def takes_anything(record: Any) -> bool:
    """Whether what ``record`` makes takes arguments of any name."""
    found = record.__signature_info__.parameters
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found.values())


def _default(record: Any, name: str) -> Any:
    cls = fdl.get_callable(record)
    if dataclasses.is_dataclass(cls):
        for field in dataclasses.fields(cls):
            if field.name == name and field.init:
                if field.default_factory is not dataclasses.MISSING:
                    return as_record(field.default_factory())
                if field.default is not dataclasses.MISSING:
                    return field.default
    return parameters(record).get(name, inspect.Parameter.empty)
