"""Hostile changes to plain data (JSON) and to the text of YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tests.fuzz.choices import Choices

MANY = 5000


class Raw(str):
    """A piece of JSON text that is written as it is."""


class Twice(dict):  # type: ignore[type-arg]
    """An object that is written with its first key twice."""


def _deep(levels: int, kind: str) -> Any:
    return Raw(
        "[" * levels + "]" * levels if kind == "[" else '{"a":' * levels + "0" + "}" * levels
    )


TEXTS = (
    "",
    ".",
    "..",
    "../../../../etc/passwd",
    "/etc/passwd",
    "/dev/stdin",
    "a/../../b",
    "a\0b",
    "\ud800",
    "\u202e\x1b[31m\r\n",
    "x" * 5000,
    "0" * 5000,
    "float32",
    "F32",
    "bfloat16",
    "<f8",
    "NaN",
    "-0",
    "1e400",
    "{}",
    "*",
    "_target_",
    "__class__",
    "os.system",
    "%s%n{0.__class__}",
    "\N{FULLWIDTH DIGIT ONE}\N{SUPERSCRIPT TWO}",
    "nemo:../../etc/passwd",
    "hf://a/b",
)
NUMBERS = (
    0, 1, 2, 3, 7, 8, 64, 255, 4096, -1, -2, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**62,
    2**63 - 1, 2**63, 2**64, 10**30, -(2**63), -(2**64), 0.5, 1e308, -0.0,
)  # fmt: skip
VALUES: tuple[Callable[[], Any], ...] = (
    lambda: None,
    lambda: True,
    lambda: False,
    lambda: [],
    lambda: {},
    lambda: [0],
    lambda: [[]],
    lambda: {"": None},
    lambda: Raw("NaN"),
    lambda: Raw("-Infinity"),
    lambda: Raw("1e999"),
    lambda: Raw("9" * 5000),
    lambda: Raw('"\\ud800"'),
    lambda: Raw('{"a":1,"a":2}'),
    lambda: Raw(""),
    lambda: [2**40, 2**40],
    lambda: [1] * 70,
    lambda: [0] * 3000,
    lambda: [2**62, 0],
    lambda: {"_target_": "os.system", "_args_": ["true"]},
    lambda: {"type": "ref", "key": "root"},
    lambda: _deep(50, "["),
    lambda: _deep(300, "["),
    lambda: _deep(300, "{"),
    lambda: _deep(100_000, "["),
    lambda: {str(n): n for n in range(2000)},
)


def hostile(choices: Choices) -> Any:
    """A value that should not be there."""
    kind = choices.below(3)
    if kind == 0:
        return choices.pick(NUMBERS)
    return choices.pick(TEXTS) if kind == 1 else choices.pick(VALUES)()


def copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    return [copied(value) for value in tree] if isinstance(tree, list) else tree


def spots(tree: Any) -> list[tuple[Any, Any]]:
    """Every place in ``tree``: the container and the key."""
    found = []
    waiting = [tree]
    while waiting:
        here = waiting.pop()
        pairs = here.items() if isinstance(here, dict) else enumerate(here)
        for key, value in pairs:
            found.append((here, key))
            if isinstance(value, dict | list):
                waiting.append(value)
    return found


def spoil(tree: Any, choices: Choices) -> Any:
    """``tree``, a dict or a list, with one change; the caller's own is left alone."""
    tree = copied(tree)
    places = spots(tree)
    if not places:
        return hostile(choices)
    here, key = choices.pick(places)
    value = here[key]
    if choices.hardly() and len(places) < MANY:
        swell(here, key)
        return tree
    action = choices.below(8)
    if action in (0, 1):
        here[key] = hostile(choices)
    elif action == 2:
        del here[key]
    elif action == 3:
        other, name = choices.pick(places)
        here[key] = copied(other[name])
    elif action == 4 and type(value) in (int, float):
        here[key] = choices.pick((value + 1, value - 1, value * 2, -value, value / 3, str(value)))
    elif action == 4 and isinstance(value, str):
        here[key] = choices.pick((value[:-1], value + "x", value.upper(), f"../{value}", [value]))
    elif action == 5:
        here[key] = [value] if choices.byte() % 2 == 0 else {"a": value}
    elif action == 6 and isinstance(here, dict):
        here[choices.pick(TEXTS)] = value
    elif action == 6:
        here.insert(key, copied(value))
    elif isinstance(value, dict) and value:
        here[key] = Twice(value)
    else:
        return hostile(choices) if choices.rarely() else Twice(tree) if type(tree) is dict else tree
    return tree


def swell(here: Any, key: Any) -> None:
    """Thousands of entries like one that is there, to find what takes quadratic time."""
    value = here[key]
    if isinstance(here, dict):
        here.update({f"{key}{number}": value for number in range(MANY)})
    else:
        here.extend([value] * MANY)


def json_text(tree: Any) -> str:
    """JSON text, with what the standard library would not write."""
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, dict):
        pairs = [f"{json.dumps(str(key))}:{json_text(value)}" for key, value in tree.items()]
        if isinstance(tree, Twice) and pairs:
            pairs.append(pairs[0])
        return "{" + ",".join(pairs) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(json_text, tree)) + "]"
    return json.dumps(tree)


def spoil_json(data: bytes, choices: Choices) -> bytes:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return data
    if not isinstance(tree, dict | list):
        tree = [tree]
    for _ in range(1 + choices.below(3)):
        if isinstance(tree, dict | list):
            tree = spoil(tree, choices)
    try:
        return json_text(tree).encode("utf-8", "surrogatepass")
    except RecursionError:  # a tree that was put into itself too often
        return data


SCRAPS = (
    "!!python/object/apply:os.system ['true']",
    "!!python/name:os.system",
    "!!binary zz",
    "!!binary eHg=",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!timestamp 2001-99-99",
    "!!int x",
    "!!float 1_",
    "!!null x",
    "!!str",
    "!local x",
    "! x",
    "&a [*a]",
    "&a {b: *a}",
    "*nowhere",
    "&x [&y [&z [1]], *y, *y, *z]",
    "{<<: {a: 1}}",
    "{<<: [1]}",
    "{<<: *nowhere}",
    "{? [a] : b}",
    "{a: 1, a: 2}",
    "[" * 90 + "]" * 90,
    "{a: " * 90 + "}" * 90,
    "1e400",
    "1e5",
    "-.inf",
    ".nan",
    "0x_",
    "0b",
    "0b1_",
    "_1",
    "+0x1",
    "1:60:99",
    "1:1.5",
    "0o9",
    "09",
    "2001-13-45",
    "9" * 5000,
    "'\u0085'",
    '"\\ud800"',
    '"\\U0010ffff"',
    '"\\x00"',
    "|\n  text",
    "=",
    "<<",
    "~",
    "''",
    "nemo:../../etc/passwd",
    "nemo:/etc/passwd",
    "nemo:",
    "/etc/passwd",
    "{_target_: os.system, _call_: true, _args_: [x]}",
    "{_target_: torch.float32, _call_: false}",
    "{_target_: 5, _call_: false}",
    "{_target_: pkg.Enum, _name_: [x], _args_: 5}",
    "{_target_: dataclasses._HAS_DEFAULT_FACTORY_CLASS}",
)
LINES = (
    "---",
    "...",
    "%YAML 3.0",
    "%TAG ! tag:x,2000:",
    "\t- a",
    "- a",
    "? b",
    ": c",
    "#",
    "\ufeff",
)


def spoil_yaml(data: bytes, choices: Choices) -> bytes:
    lines = data.decode("utf-8", "replace").split("\n")
    if choices.hardly() and len(lines) < MANY:
        number = choices.below(len(lines))
        copies = [lines[number].replace(":", f"{n}:", 1) for n in range(MANY)]
        lines[number:number] = copies
    for _ in range(1 + choices.below(3)):
        number = choices.below(len(lines))
        action = choices.below(6)
        if action in (0, 1):
            scrap = choices.pick(SCRAPS)
            lines[number] = re.sub(r"(?<=[:-] ).*$", lambda _, s=scrap: s, lines[number])
        elif action == 2:
            lines.insert(number, choices.pick(LINES + SCRAPS))
        elif action == 3:
            del lines[number : number + 1 + choices.below(3)]
            lines = lines or [""]
        elif action == 4:
            lines.insert(choices.below(len(lines)), lines[number])
        else:
            lines[number] = choices.pick(("  ", " ", "\t", "- ", "a: ", "&a ")) + lines[number]
    return "\n".join(lines).encode("utf-8", "surrogatepass")
