"""Good checkpoints of every format, as its own tests write them, with one thing damaged.

Damage is an error of ours, or does not matter: then every tensor is what was written. A flipped bit
may change a number; what it must not do is anything else.
"""

import functools
import importlib.util
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tests.hostile.corpus import ANY, Group, Target
from tests.hostile.craft import STATE

GROUP = Group("generic")
TESTS = Path(__file__).parents[2] / "formats"
WRITER = re.compile(r"^def (write_tiny\w*)\(", re.MULTILINE)
KEPT = (0.05, 0.5, 0.95, -1)
FLIPS = 4
MOST_FILES = 2


def writers() -> list[tuple[str, str]]:
    """The writers of every format, by the text of its tests: nothing is imported to count them."""
    return [
        (file.stem.removeprefix("test_"), name)
        for file in sorted(TESTS.glob("test_*.py"))
        for name in WRITER.findall(file.read_text())
    ]


@functools.cache
def module_for(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"hostile_{name}", TESTS / f"test_{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(folder: Path, name: str, writer: str) -> dict[str, torch.Tensor]:
    """What a format's own tests write, copied from the first time that they were asked."""
    module = module_for(name)
    state = {
        key: value
        for key, value in STATE.items()
        if value.dtype not in getattr(module, "UNWRITTEN", ())
    }
    pristine = folder.parent.parent / "pristine" / f"{name}_{writer}"
    if not pristine.exists():
        pristine.mkdir(parents=True)
        getattr(module, writer)(pristine, state)
    shutil.copytree(pristine, folder, symlinks=True, dirs_exist_ok=True)
    return state


def chosen(folder: Path, number: int) -> Path:
    """One of the files, the largest first; the last again if there are fewer."""
    files = sorted(
        (p for p in folder.rglob("*") if p.is_file()), key=lambda p: (-p.stat().st_size, str(p))
    )
    return files[min(number, len(files) - 1)]


def truncated(kept: float) -> Callable[[Path, int], None]:
    def damage(folder: Path, number: int) -> None:
        file = chosen(folder, number)
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * kept) if kept > 0 else kept])

    return damage


def emptied(folder: Path, number: int) -> None:
    chosen(folder, number).write_bytes(b"")


def garbled(folder: Path, number: int) -> None:
    chosen(folder, number).write_bytes(random.Random(number).randbytes(3000))


def replaced_by_text(folder: Path, number: int) -> None:
    chosen(folder, number).write_text("{}")


def missing(folder: Path, number: int) -> None:
    chosen(folder, number).unlink()


def swapped(folder: Path, number: int) -> None:
    one, other = chosen(folder, number), chosen(folder, number + 1)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def flipped(seed: int) -> Callable[[Path, int], None]:
    def damage(folder: Path, number: int) -> None:
        chance = random.Random(seed * 100 + number)
        file = chosen(folder, number)
        data = bytearray(file.read_bytes())
        for _ in range(1 + seed):
            at = chance.randrange(min(len(data), 4096))
            data[at] ^= 1 << chance.randrange(8)
        file.write_bytes(data)

    return damage


DAMAGE = {
    **{f"truncated_to_{kept}": truncated(kept) for kept in KEPT},
    "emptied": emptied,
    "garbled": garbled,
    "replaced_by_text": replaced_by_text,
    "swapped": swapped,
    "missing": missing,
    **{f"flipped_{seed}": flipped(seed) for seed in range(FLIPS)},
}


def case(name: str, writer: str, damage: Callable[[Path, int], None], number: int) -> Any:
    def make(folder: Path) -> Target:
        state = written(folder, name, writer)
        damage(folder, number)
        return Target(tensors=state)

    return make


# Nothing says how many files there should be, or which of two equal halves is the first.
UNKNOWABLE = (("write_tiny_without_index", "missing"), ("write_tiny", "swapped"))

for format_name, writer in writers():
    for what, damage in DAMAGE.items():
        for number in range(1 if what in ("swapped", "replaced_by_text") else MOST_FILES):
            kind = "either" if (writer, what) in UNKNOWABLE or "flip" in what else "sound"
            GROUP.add(
                f"{format_name}_{writer}_{what}_file_{number}",
                case(format_name, writer, damage, number),
                kind=kind,
                errors=ANY,
            )
