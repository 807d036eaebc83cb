"""``cache``: what was converted once, listed, verified, removed."""

from __future__ import annotations

import argparse
import re
import time
from typing import TYPE_CHECKING, Any

from bioinit.cli.said import EXITS, print_json, say

if TYPE_CHECKING:
    from bioinit.cache import Kept

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_KEY_SHOWN = 12


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the verb takes."""
    parser.add_argument("what", choices=("list", "verify", "prune"), help="what to do")
    parser.add_argument("keys", nargs="*", metavar="KEY", help="of verify and prune: these alone")
    add = parser.add_argument
    add("--older-than", metavar="AGE", help="of prune: not used for so long; 30d, 12h, 2w")
    add("--most", metavar="SIZE", help="of prune: what may stay, the last used of it; 100GB")
    add("--all", action="store_true", help="of prune: everything that nobody uses now")
    add("--json", action="store_true", help="print one JSON document")
    parser.epilog = (
        "for example:\n  bioinit cache verify\n  bioinit cache prune --older-than 30d\n"
        "  bioinit cache prune 3f2a91c0\n\n"
        "prune alone removes what is damaged or was never finished. What a process uses stays.\n"
        f"The cache is $BIOINIT_HOME, or ~/.cache/bioinit.\n{EXITS}"
    )


def run(given: argparse.Namespace) -> int:
    """Do what was asked for."""
    _require_fitting(given)
    if given.what == "list":
        return _list(given)
    if given.what == "verify":
        return _verify(given)
    return _prune(given)


def _require_fitting(given: argparse.Namespace) -> None:
    from bioinit.errors import ConfigError

    of_prune = {"--older-than": given.older_than, "--most": given.most, "--all": given.all}
    said = [name for name, value in of_prune.items() if value not in (None, False)]
    if given.what != "prune" and said:
        raise ConfigError(
            f"{', '.join(said)} means nothing to `cache {given.what}`. Write `bioinit cache prune`."
        )
    if given.keys and (given.what == "list" or said):
        words = " ".join([given.what, *said])
        raise ConfigError(
            f"`cache {words}` takes no keys, and was given {' '.join(given.keys)}. Leave them out."
        )


def _list(given: argparse.Namespace) -> int:
    from bioinit import cache
    from bioinit.report import human_bytes

    held = cache.entries()
    if given.json:
        print_json([kept.to_json() for kept in held])
        return 0
    for kept in held:
        print(_line(kept))
    total = human_bytes(sum(kept.bytes for kept in held))
    print(f"{len(held)} in {cache.home()}, {total}")
    return 0


def _verify(given: argparse.Namespace) -> int:
    from bioinit import cache
    from bioinit.errors import CorruptCheckpoint

    found: list[dict[str, Any]] = []
    for kept in _chosen(given.keys):
        if kept.state != "unfinished":
            wrong = cache.verify(kept)
            found.append({"key": kept.key, "path": str(kept.path), "damage": wrong})
    if given.json:
        print_json(found)
    bad = [entry for entry in found if entry["damage"]]
    if bad:
        said = "; ".join(f"{entry['path']}: {', '.join(entry['damage'])}" for entry in bad)
        raise CorruptCheckpoint(
            f"{len(bad)} of {len(found)} in the cache are not what was made: {said}. Remove them "
            f"with `bioinit cache prune {' '.join(entry['key'] for entry in bad)}`: the next start "
            "makes them again."
        )
    if not given.json:
        print(f"{len(found)} in {cache.home()} are what was made")
    return 0


def _chosen(keys: list[str]) -> list[Kept]:
    """Everything, or what ``keys`` are the beginnings of."""
    from bioinit import cache
    from bioinit.errors import ConfigError

    held = cache.entries()
    for key in keys:
        if not any(kept.key.startswith(key) for kept in held):
            raise ConfigError(
                f"nothing in {cache.home()} has a key that begins with {key!r}. `bioinit cache "
                "list` shows what there is."
            )
    return [kept for kept in held if not keys or kept.key.startswith(tuple(keys))]


def _prune(given: argparse.Namespace) -> int:
    from bioinit import cache
    from bioinit.convert.options import bytes_of
    from bioinit.report import human_bytes

    done = cache.prune(
        keys={kept.key for kept in _chosen(given.keys)} if given.keys else (),
        older_than=None if given.older_than is None else _seconds(given.older_than),
        most=None if given.most is None else bytes_of(given.most, "--most"),
        everything=given.all,
    )
    if given.json:
        print_json({name: [k.to_json() for k in held] for name, held in done._asdict().items()})
        return 0
    for kept in done.removed:
        print(f"removed  {_line(kept)}")
    for kept in done.spared:
        say(f"{kept.path} is in use, and stays")
    freed = human_bytes(sum(kept.bytes for kept in done.removed))
    print(f"{len(done.removed)} removed from {cache.home()}, {freed}")
    return 0


def _seconds(age: str) -> float:
    from bioinit.errors import ConfigError

    match = _AGE.fullmatch(age.strip())
    if match is None:
        raise ConfigError(f"--older-than={age!r} is no age. Write 30d, 12h, 45m or 2w.")
    return float(match[1]) * _SECONDS[match[2]]


def _line(kept: Kept) -> str:
    from bioinit.report import human_bytes, printable

    about = kept.about
    what = " ".join(
        [about.get("source", "?"), *([f"-> {about['to']}"] if "to" in about else [])]
        if about
        else [kept.path.name]
    )
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(kept.used))
    state = f"{kept.state}{', in use' if kept.in_use else ''}"
    return printable(
        f"{kept.key[:_KEY_SHOWN]}  {human_bytes(kept.bytes):>10}  used {when}  {state:<15}  {what}"
    )
