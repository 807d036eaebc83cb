"""Settings that a config takes over from a checkpoint.

What a checkpoint was saved with is compared with the config field by field; the fields that
``override_parent_fields`` names stay as they are, the others get the checkpoint's value. Everything
is worked out before the first field is changed.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import fiddle as fdl

from bioinit.compat._capture import as_record
from bioinit.compat.bionemo.iomixin_utils import hparams_of
from bioinit.compat.bionemo.overrides import OF_BIOBERT
from bioinit.compat.bionemo.source import Source, built, open_source
from bioinit.errors import ConfigError
from bioinit.keys import suggestion
from bioinit.record import same

logger = logging.getLogger(__name__)

_OF_THE_START = (
    "initial_ckpt_path",
    "initial_ckpt_skip_keys_with_these_prefixes",
    "override_parent_fields",
)
"""Fields that say how this run starts: a config never takes them over from an earlier run."""


class IOMixinProto(Protocol):
    """Something whose hyper-parameters can be read and set.

    Stands in for ``bionemo.llm.model.config.IOMixinProto``.
    """

    def set_hparam(self, attribute: str, value: Any, also_change_value: bool = True) -> None:
        """Set the hyper-parameter ``attribute``, and the attribute unless told otherwise."""
        ...

    def get_hparam(self, attribute: str) -> Any:
        """Give the hyper-parameter ``attribute``."""
        ...


def override_mutate_possibly_extra_mutated_fiddle(
    target_cfg: IOMixinProto,
    source_cfg: IOMixinProto,
    maybe_mutated_elements_to_clone: Iterable[str],
) -> None:
    """Give ``target_cfg`` the hyper-parameters and the attributes of ``source_cfg``.

    Both are given, since a ``__post_init__`` may have made the attribute something else than what
    was passed. Stands in for
    ``bionemo.llm.model.config.override_mutate_possibly_extra_mutated_fiddle``. Different here: all
    is read before anything is written; a field that its class computes (``init=False``) has no
    hyper-parameter, and its attribute alone is given; lists and dicts are copied, so that two
    configs do not share them.

    Raises:
        UnknownHparam: ``source_cfg`` lacks one of the names. It is a ``KeyError``.
    """
    names = tuple(maybe_mutated_elements_to_clone)
    computed = _computed(source_cfg) | _computed(target_cfg)
    hparams = {f: _own(source_cfg.get_hparam(f)) for f in names if f not in computed}
    attributes = {f: _own(getattr(source_cfg, f)) for f in names}
    for name in names:
        if name in hparams:
            target_cfg.set_hparam(name, hparams[name], also_change_value=False)
        setattr(target_cfg, name, attributes[name])


def load_settings_from_checkpoint(config: Any, initial_ckpt_path: str | Path) -> None:
    """Give ``config`` the settings that a checkpoint was saved with, in place.

    Stands in for the method of this name of
    ``bionemo.llm.model.config.MegatronBioNeMoTrainableModelConfig``. Each field that both have and
    ``config.override_parent_fields`` does not name gets the checkpoint's value, also where somebody
    set another; a warning in the log names those. Different here: the saved config's class need not
    be installed; what was not set when it was saved has the default of that day, where
    ``model.yaml`` says it; what is computed from a field that is kept is computed again; the path
    and the lists of this start are never taken over; a name in ``override_parent_fields`` that
    nobody knows is an error.

    Args:
        config: a dataclass that mixes in ``IOMixinWithGettersSetters``, with
            ``override_parent_fields``.
        initial_ckpt_path: the checkpoint's folder, in which ``context/`` lies.

    Raises:
        MissingSettings: no saved config lies there. It is a ``FileNotFoundError``.
        ConfigError: a name in ``override_parent_fields`` is unknown, a saved value cannot be
            understood, or what is kept contradicts what is taken over.
    """
    path = Path(initial_ckpt_path)
    logger.info("taking over the settings of %s", path)
    mine = {field.name: field for field in _fields(config)}
    kept = config.override_parent_fields
    if isinstance(kept, str):
        raise ConfigError(
            f"override_parent_fields={kept!r} is one text, and each of its letters would be a "
            f"field. Write [{kept!r}]."
        )
    stays = frozenset((*kept, *_OF_THE_START))
    plainly = _set_plainly(config)
    source = open_source(path, config, stays, plainly)
    _require_known(kept, mine, source)
    taken = [name for name in mine if name in source.names and name not in stays]
    given = {**config.get_hparams(), **plainly}
    differing = {
        name: given[name] if name in given else config.get_hparam(name)
        for name in mine
        if name in source.names and name in stays and name in source.hparams and mine[name].init
    }
    attributes = source.attributes(
        {name: ours for name, ours in differing.items() if _says_something(name, ours, source)}
    )
    _warn_of_losers(config, given, source, taken)
    for name in taken:
        if name in source.hparams and mine[name].init:
            config.set_hparam(name, _own(source.hparams[name]), also_change_value=False)
        setattr(config, name, _own(attributes[name]))


def _fields(config: Any) -> tuple[dataclasses.Field[Any], ...]:
    if not dataclasses.is_dataclass(config):
        raise ConfigError(
            f"{type(config).__name__} is no dataclass, so nobody knows its fields. Decorate it "
            "with @dataclass."
        )
    return dataclasses.fields(config)


def _computed(config: Any) -> frozenset[str]:
    """The fields that the class itself computes."""
    if not dataclasses.is_dataclass(config):
        return frozenset()
    return frozenset(field.name for field in dataclasses.fields(config) if not field.init)


def _own(value: Any) -> Any:
    """``value``, copied where two owners could change it."""
    if isinstance(value, list | dict | set | fdl.Buildable):
        return copy.deepcopy(value)
    return value


def _require_known(kept: Iterable[str], mine: Collection[str], source: Source) -> None:
    known = {*mine, *source.names, *OF_BIOBERT}
    for name in kept:
        if name not in known:
            raise ConfigError(
                f"override_parent_fields names {name!r}, which is a field neither of this config "
                f"nor of the one in {source.where}. {suggestion(name, known)} Correct or drop it."
            )


def _set_plainly(config: Any) -> dict[str, Any]:
    """Attributes that somebody set without ``set_hparam``, as arguments.

    What ``__post_init__`` makes of an argument is no such attribute: a config that is made from the
    same arguments again has it as well.
    """
    fields = [f.name for f in dataclasses.fields(config) if f.init and hasattr(config, f.name)]
    unlike = [
        name
        for name in fields
        if name not in _OF_THE_START
        and _has_a_value(getattr(config, name))
        and not same(as_record(getattr(config, name)), config.get_hparam(name))
    ]
    if not unlike:
        return {}
    try:
        again = built(hparams_of(config), f"this {type(config).__name__} was made from")
    except ConfigError:
        return {}  # as it stands it could not be made; what is taken over may mend that
    return {
        name: as_record(getattr(config, name))
        for name in unlike
        if not same(getattr(config, name), getattr(again, name))
    }


def _has_a_value(thing: Any) -> bool:
    """Whether two of its kind can be equal: an object that is only itself says nothing."""
    kind: Any = type(thing)
    is_one_of_few = isinstance(thing, type | enum.Enum) or kind.__module__ == "torch"
    return is_one_of_few or kind.__eq__ is not object.__eq__


def _says_something(name: str, ours: Any, source: Source) -> bool:
    """Whether keeping ``ours`` may change what is computed from the field."""
    theirs = source.hparams[name]
    if name in _OF_THE_START or isinstance(ours, type) or isinstance(theirs, type):
        return False  # a class is one of model or of loss
    return not same(ours, theirs)


def _warn_of_losers(
    config: Any, given: Mapping[str, Any], source: Source, taken: Sequence[str]
) -> None:
    for name in taken:
        if name in given and name in source.hparams and not same(given[name], source.hparams[name]):
            logger.warning(
                "%s of %s is %r in the checkpoint, and that is taken: the %r that was set is lost. "
                "Add it to override_parent_fields to keep it.",
                name,
                type(config).__name__,
                source.hparams[name],
                given[name],
            )
