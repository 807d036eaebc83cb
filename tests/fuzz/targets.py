"""What is fuzzed: whole checkpoints of every kind, and single parsers, each from bytes."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import pickle
import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from bioinit import contexts, families, formats
from bioinit.contexts._fiddle import parse_fiddle
from bioinit.contexts._yaml import parse_yaml, unfolded
from bioinit.storage import File, Folder, tar, zip
from bioinit.unpickle import find_weights, load, plain
from tests.fuzz import binary, cases, changes, trees, watch
from tests.fuzz.cases import Case
from tests.fuzz.changes import Spoil
from tests.fuzz.choices import Choices

MOST_SPOILS = 3


class Parser(NamedTuple):
    """A parser by itself: how it is called, what it starts from, how that is changed."""

    call: Callable[[Path], object]
    seeds: Callable[[], list[bytes]]
    spoil: Spoil
    name: str = "input"


def _parse_pickle(path: Path) -> None:
    value = load(path.read_bytes(), where=str(path))
    json.dumps(plain(value))
    find_weights(value, str(path))


def _parse_json(path: Path) -> None:
    json.dumps(parse_fiddle(Folder.at(path.parent).read_json(path.name), str(path)), default=str)


def _parse_yaml(path: Path) -> None:
    unfolded(parse_yaml(Folder.at(path.parent).read_text(path.name), str(path)))


def _list_tar(path: Path) -> None:
    for member in tar.members(File.at(path)).values():
        member.read(0, min(member.size, 1 << 16))
        member.read(member.size - min(member.size, 100), min(member.size, 100))


def _list_zip(path: Path) -> None:
    file = File.at(path)
    zip.first_name(file)
    for name, member in zip.members(file).items():
        if member.is_plain:
            start = zip.data_start(file, name, member)
            file.read(start, min(member.size, 1 << 16))


def _pickles() -> list[bytes]:
    found = [pickle.dumps({"a": [1, (2.5, None)], "b": {3}, "c": b"x"}, n) for n in range(6)]
    for case in (*cases.valid("torch_zip"), *cases.valid("torch_dist")[:2]):
        for name, data in case.items():
            if name == ".metadata":
                found.append(data)
            elif data.startswith(b"PK") and not name.endswith(".distcp"):
                found += [m.data for m in binary.unzipped(data) if m.name.endswith(b".pkl")]
    return found


def _tars() -> list[bytes]:
    small = {"./model_config.yaml": b"a: 1\n", "./model_weights.ckpt": b"x" * 700, "b/c": b""}
    return [binary.tarred(small)]


PARSERS = {
    "fiddle": Parser(
        _parse_json, lambda: [json.dumps(cases.FIDDLE, indent=1).encode()], trees.spoil_json
    ),
    "gzip": Parser(
        _list_tar, lambda: [gzip.compress(_tars()[0], 1, mtime=0)], binary.spoil_gzip
    ),
    "pickle": Parser(_parse_pickle, _pickles, binary.spoil_pickle),
    "safetensors": Parser(
        lambda path: formats.open_weights(Folder.at(path)),
        lambda: [cases.valid("hub")[0]["model.safetensors"]],
        binary.spoil_safetensors,
        "model.safetensors",
    ),
    "tar": Parser(_list_tar, _tars, binary.spoil_tar),
    "yaml": Parser(
        _parse_yaml,
        lambda: [cases.MODEL_YAML, cases.NEMO1, cases.BRIDGE, cases.NEOX],
        trees.spoil_yaml,
    ),
    "zip": Parser(
        _list_zip,
        lambda: [cases.valid("torch_zip")[0]["pytorch_model.bin"]],
        binary.spoil_zip,
    ),
}  # fmt: skip
NAMES = (*cases.CASES, *PARSERS)


@cache
def seeds(target: str) -> list[bytes]:
    """What a parser starts from; nothing for checkpoints, which come from decisions alone."""
    return PARSERS[target].seeds() if target in PARSERS else []


def case_of(target: str, data: bytes) -> Case:
    """The input that ``data`` stands for: decisions, or, after an odd first byte, itself."""
    if target not in PARSERS:
        return changes.build(target, Choices(data))
    if data[:1] and data[0] % 2:
        return {PARSERS[target].name: data[1:]}
    choices = Choices(data[1:])
    found = choices.pick(seeds(target))
    for _ in range(choices.pick((0, 1, 1, 1, 1, 2, 2, MOST_SPOILS))):
        found = PARSERS[target].spoil(found, choices)
    return {PARSERS[target].name: found}


def check(target: str, case: Case, folder: Path) -> None:
    """Run the target over ``case``, laid out in ``folder``; raises :class:`watch.Defect`."""
    if target not in PARSERS:
        watch.open_all(case, folder)
        return
    watch.lay_out(case, folder)
    (name,) = case
    with watch.watched(folder.parent, len(case[name])):
        PARSERS[target].call(folder / name)


def decisions(target: str, number: int) -> bytes:
    """The ``number``-th random input of a target, the same on every machine."""
    mixed = hashlib.sha256(f"{target} {number}".encode()).digest()
    size = (16, 32, 64, 200)[number % 4]
    return (b"\0" if target in PARSERS else b"") + random.Random(mixed).randbytes(size)


def import_everything() -> None:
    """Import what is otherwise imported when it is first asked for."""
    for corridor in (formats, contexts, families):
        for name in corridor.names():
            corridor.load(name)


def warm_up(folder: Path) -> list[str]:
    """Open something of every kind, so that later nothing is imported for the first time.

    Returns what does not open although it is as its own software writes it.
    """
    for name in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):  # JSON's, by its first bytes
        codecs.lookup(name)
    import_everything()
    wrong = []
    for target in NAMES:
        try:
            if target in PARSERS:
                name = PARSERS[target].name
                for data in seeds(target):
                    watch.lay_out({name: data}, folder)
                    PARSERS[target].call(folder / name)
                continue
            for case in cases.valid(target):
                watch.open_valid(case, folder)
        except Exception as error:
            wrong.append(f"{target}: {type(error).__name__}: {error!s:.300}")
    return wrong


def shrunk(target: str, data: bytes, folder: Path, tries: int = 300) -> Case:
    """A smaller case with the same finding: fewer decisions that are not the first option."""
    wanted = _finding(target, case_of(target, data), folder)

    def holds(case: Case) -> bool:
        nonlocal tries
        tries -= 1
        return tries > 0 and _finding(target, case, folder) == wanted

    size = len(data)
    while size:
        size //= 2
        for at in range(0, len(data), max(size, 1)):
            for fewer in (
                data[:at] + data[at + size :],
                data[:at] + bytes(size) + data[at + size :],
            ):
                if size and fewer != data and holds(case_of(target, fewer)):
                    data = fewer
                    break
    case = case_of(target, data)
    for name in sorted(case):
        fewer_files = {other: held for other, held in case.items() if other != name}
        if fewer_files and target not in PARSERS and holds(fewer_files):
            case = fewer_files
    return case


def _finding(target: str, case: Case, folder: Path) -> str | None:
    try:
        check(target, case, folder)
    except watch.Defect as defect:
        return signature(defect)
    return None


def signature(defect: watch.Defect) -> str:
    """The kind of a finding, by which it is told from others: what, and where."""
    text = str(defect)
    what, _, place = text.rpartition(" at bioinit/")
    return f"{what.split(':')[0]} at {place}" if what else re.sub(r"\d+.*", "", text)[:40]


def to_json(target: str, found: str, case: Case) -> str:
    files = {name: _written(data) for name, data in case.items()}
    return json.dumps({"target": target, "found": found, "files": files}, indent=1) + "\n"


def from_json(text: str) -> tuple[str, Case]:
    said = json.loads(text)
    files = {
        name: bytes.fromhex(held["hex"]) if isinstance(held, dict) else held.encode()
        for name, held in said["files"].items()
    }
    return said["target"], files


def _written(data: bytes) -> str | dict[str, str]:
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError:
        return {"hex": data.hex()}
    return text if text.isprintable() or "\0" not in text else {"hex": data.hex()}
