"""``init.convert=once``: a checkpoint of another world is converted into the cache and read there.

A model is read fastest in its own dialect, and what is asked for again and again need be converted
only once. The kept folder is found by what the source holds and by what is done to it, element by
element: the plan of the conversion is made at each start, which takes milliseconds and reads no
weight, and its digest knows whether a rule that concerns this source has changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import fiddle as fdl

from bioinit import cache, families
from bioinit.cache import Content
from bioinit.config import Run
from bioinit.contexts import Checkpoint
from bioinit.convert import Decided, Options, decide
from bioinit.convert.proved import Unstated, is_whole
from bioinit.errors import ConfigError, CorruptCheckpoint, PlanError, StorageError
from bioinit.families.protocol import Family
from bioinit.ranks import World
from bioinit.record import set_in, specs
from bioinit.report import human_bytes
from bioinit.sides.said import about
from bioinit.storage import Journal

Progress = Callable[[int, int], None]
"""Told how many bytes have been read, and how many there are."""

_log = logging.getLogger("bioinit.cache")
_HF, _MEGATRON = "hf", "megatron"
_WRITTEN = {_HF: _HF, _MEGATRON: "nemo2"}
_NOT_MEGATRON = frozenset({_HF, "neox"})
_ANY = "auto"
_MANY_BYTES = 2 * 2**30


class Opened(NamedTuple):
    """The checkpoint that a run reads, and what it was converted from, if it was."""

    checkpoint: Checkpoint
    notes: tuple[str, ...] = ()
    said: Mapping[str, Any] | None = None
    """What the plan and the receipt say of what it was converted from."""
    key: str | None = None
    """What the kept folder was made of: the same wherever and whenever it was made."""
    named: tuple[Path, ...] = ()
    """Where the source lies, which no output may touch."""


class _Kept(NamedTuple):
    path: Path
    made_of: Mapping[str, str]


@contextmanager
def opened(
    path: str,
    record: fdl.Config[Run],
    run: Run,
    family: Callable[[], Family],
    world: World,
    *,
    converts: bool = True,
    progress: Progress | None = None,
) -> Iterator[Opened]:
    """The checkpoint that ``run`` reads, open.

    Args:
        path: what the run names.
        record: of the run.
        run: the run.
        family: of the model; asked only where something may be converted.
        world: the ranks that start the model; all of them call this.
        converts: if False, nothing is converted now, and no weight read: what is not in the cache
            is read as it is.
        progress: is told of the conversion.

    Raises:
        BioinitError: the checkpoint cannot be used, or what it holds has no place in the model's
            dialect, or the cache cannot be written.
    """
    if world.size > 1:
        # Before anybody waits for somebody who converts.
        world.agree({"init.convert": str(bool(run.init.convert))})
    with families.open_checkpoint(path) as source:
        if not run.init.convert:
            yield Opened(source)
            return
        to, why = _dialect_for(source, record, family())
        if to is None:
            yield Opened(source, (f"init.convert=once: {why}, and it is used as it is",))
            return
        decided = _decided(source, record, run, family(), to)
        kept = _among(world, lambda: _ask(decided, converts, world, progress))
        if kept is None:
            later = f"init.convert=once: a start converts it to {to} first, and reads the result"
            yield Opened(source, (later,))
            return
        named = (source.path, *(file.path for file in source.files))
        found = about(source, decided.source.name)
        said = {**(found or {}), "content": kept.made_of["content"], "kept": str(kept.path)}
    note = f"converted once to {to} from {said['path']} ({said['format']}, dialect {_said(source)})"
    with families.open_checkpoint(kept.path) as checkpoint:
        key = cache.key_of(kept.made_of)
        yield Opened(checkpoint, (note,), said, key, named)


def _dialect_for(
    source: Checkpoint, record: fdl.Config[Run], family: Family
) -> tuple[str | None, str]:
    """Which dialect the model is built in, if the source is in another one; else why not."""
    model = record.model
    asked = model.get("backend") if isinstance(model, Mapping) else getattr(model, "backend", None)
    lives_as = _MEGATRON if asked == _MEGATRON else _HF
    context = source.context
    if family.config is None:  # the family of whatever transformers builds
        dialect = source.dialect
        own = {_HF, None}
        if families.find(context, source.tensors) in (_ANY, None):
            return None, f"no family with another dialect knows {source.path}"
    elif not family.dialects or (context is not None and not family.recognizes(context)):
        return None, f"no other dialect of {source.path} is known"
    else:
        dialect = families.dialect_in(family, context, source.tensors)
        others = frozenset(family.dialects) - _NOT_MEGATRON
        own = {_HF} if lives_as == _HF else set(others)
    if dialect in own:
        return None, f"{source.path} is in the model's own dialect ({dialect})"
    return _WRITTEN[lives_as], ""


def _decided(
    source: Checkpoint, record: fdl.Config[Run], run: Run, family: Family, to: str
) -> Decided:
    given: dict[str, Any] = {}
    if not is_whole(source.context):
        # What no saved config states, the run does; what it changes is no matter of the source.
        known = specs(family.config_for(source.context))
        given = {
            name: value
            for name, value in set_in(record.model).items()
            if name in known and not known[name].marks.own
        }
    name = run.family if family.config is not None else None
    options = Options.of(to, None, None, None, None, ())
    try:
        return decide(source, options, family=name, set=given)
    except Unstated as error:
        sets = " ".join(f"model.{name}=VALUE" for name in error.fields)
        raise ConfigError(
            f"init.convert=once: {error.what} State each of them in the recipe, or beside it: "
            f"{sets}; or leave init.convert out."
        ) from error
    except (ConfigError, PlanError) as error:
        said = (
            f"init.convert=once: {error} These are options of `bioinit convert SRC DST --to {to}`, "
            "which makes a folder to start from; or leave init.convert out."
        )
        if isinstance(error, PlanError):
            raise PlanError(said, error.problems) from error
        raise ConfigError(said) from error


def _ask(decided: Decided, converts: bool, world: World, progress: Progress | None) -> _Kept | None:
    """The kept folder of ``decided``, made now if need be; None if it is not there and may not be.

    Raises:
        ConfigError: nobody could know it again.
        CorruptCheckpoint: the source is being written.
    """
    source = decided.source.checkpoint
    rules = decided.rules
    if rules is None:
        raise ConfigError(
            f"init.convert=once: the tables of {decided.source.name!r} convert {source.path} by "
            "functions, and nobody can know whether they are the same ones next time. Leave "
            "init.convert out, or convert by hand: bioinit convert SRC DST."
        )
    paths = [file.path for file in source.folder.asked]
    if not converts and not cache.is_remembered(paths):
        return None
    content = _content(source, paths)
    made_of = {"content": content.digest, "rules": rules}
    found = cache.find(made_of)
    if found is not None or not converts:
        return None if found is None else _Kept(found, made_of)
    options = decided.options

    def make(at: Path, journal: Journal) -> Mapping[str, str]:
        _log.warning(
            "bioinit: converting %s (%s, dialect %s) to %s, once, into the cache at %s",
            source.path,
            human_bytes(source.bytes),
            _said(source),
            options.to,
            cache.home(),
        )
        receipt = decided.begin(progress).into(at, journal)
        content.require_unchanged()
        return {entry["path"]: entry["sha256"] for entry in receipt["files"]}

    told = {
        "source": str(source.path),
        "dialect": _said(source),
        "to": options.to,
        "format": options.format,
        "family": decided.source.name,
    }
    lies = (source.path, *paths)
    try:
        path = cache.keep_in_steps(
            None,
            made_of,
            make,
            moment=content.moment,
            about=told,
            apart=lies,
            waiting=world.check,
        )
    except StorageError as error:
        if str(cache.home()) not in str(error):
            raise
        raise StorageError(
            f"{error} The cache lies at {cache.home()}: `bioinit cache prune` makes room in it, "
            f"and {cache.HOME} names another place."
        ) from error
    return _Kept(path, made_of)


def _content(source: Checkpoint, paths: list[Path]) -> Content:
    """The content of the files from which ``source`` was opened, as they were then."""
    if source.bytes > _MANY_BYTES and not cache.is_remembered(paths):
        _log.warning(
            "bioinit: reading %s (%s) to know its content; that is remembered",
            source.path,
            human_bytes(source.bytes),
        )
    content = cache.content_of(paths)
    seen = {look.path: look.identity for look in content.files}
    for file in source.folder.asked:
        found = seen.get(file.path)
        if found is not None and found[2:4] != (file.size, file.mtime_ns):
            raise CorruptCheckpoint(
                f"{file.path} changed since it was opened. Wait until nobody writes it, then start "
                "again."
            )
    return content


def _among(world: World, ask: Callable[[], _Kept | None]) -> _Kept | None:
    """What ``ask`` gives, on all ranks: one of each host asks, and the others find it there.

    Hosts may each have a cache of their own, or share one; then the second waits for the first.
    """
    if world.size == 1:
        return ask()
    hosts = world.hosts
    first = hosts.index(hosts[world.rank])
    mine = ask() if first == world.rank else None
    each = world.gathered(None if mine is None else dict(mine.made_of))
    if len(each) < world.size:  # ranks that are only imagined
        return mine if first == world.rank else ask()
    known = [each[hosts.index(host)] for host in dict.fromkeys(hosts)]
    made_of = each[first]
    if made_of is None or None in known:
        return None
    world.agree({f"what init.convert=once reads: {name}": made_of[name] for name in made_of})
    if mine is not None:
        return mine
    found = cache.find(made_of)
    return ask() if found is None else _Kept(found, made_of)


def _said(source: Checkpoint) -> str:
    return source.dialect or "unknown"
