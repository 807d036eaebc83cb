"""A page of YAML on which every line can say why it is there.

Values are written as one line of YAML. What stands in a remark may come from a file that nobody
trusts, so it is spelled out where it could end the remark or reach for the terminal.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from typing import Any

import yaml

from bioinit.report import printable

_WIDTH = 100
_LONGEST = 240
_INTERPOLATION = re.compile(r"(\\*)\$\{")
_LONG_LIST = 8
_ENTRY = ("- ", "  ")


class Page:
    """Lines of YAML and remarks, in the order in which they are written."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def remark(self, text: str, depth: int = 0) -> None:
        """A paragraph of remarks, or an entry of a list of them."""
        start = "  " * depth + "#"
        wrapped = textwrap.wrap(
            printable(text),
            _WIDTH - len(start) - 1,
            subsequent_indent="  " if text.startswith(_ENTRY) else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        self._lines += [f"{start} {line}" for line in wrapped] or [start]

    def gap(self) -> None:
        """An empty line, unless there is one."""
        if self._lines and self._lines[-1]:
            self._lines.append("")

    def opens(self, key: str, why: str = "", depth: int = 0) -> None:
        """A key whose mapping or list follows one step deeper."""
        self._lines.append("  " * depth + f"{key}:" + _because(why))

    def says(self, key: str, value: Any, why: str = "", depth: int = 0) -> None:
        """One key with its value, and the reason in the same line."""
        self._lines.append("  " * depth + f"{key}: {spelled(value)}" + _because(why))

    def would_say(self, key: str, value: Any, why: str = "", depth: int = 0) -> None:
        """The same line as a remark: ready to be put in force by taking its ``#`` off."""
        line = f"{key}: {spelled(value)}" + _because(why)
        self._lines.append("  " * depth + "# " + printable(line))

    def item(self, value: Any, depth: int = 0) -> None:
        """One entry of a list; a mapping of one key stands without braces."""
        pairs = list(value.items()) if isinstance(value, dict) else []
        text = f"{pairs[0][0]}: {spelled(pairs[0][1])}" if len(pairs) == 1 else spelled(value)
        self._lines.append("  " * depth + f"- {text}")

    @property
    def text(self) -> str:
        """All of it."""
        return "\n".join(self._lines) + "\n"


class _Dumper(yaml.SafeDumper):
    """Writes what would end a line as an escape: in other styles of YAML it is folded."""


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def spelled(value: Any) -> str:
    """``value`` as one line of YAML.

    >>> spelled("on"), spelled(1e-12), spelled([1, 2])
    ("'on'", '1.0e-12', '[1, 2]')
    """
    dumped: str = yaml.dump(
        value, None, _Dumper, default_flow_style=True, allow_unicode=True, width=float("inf"),
        sort_keys=False,
    )  # fmt: skip
    return dumped.removesuffix("...\n").strip()


def literally(value: Any) -> Any:
    """``value`` for a recipe, whose texts are read by OmegaConf: ``${`` stays two characters."""
    if isinstance(value, dict):
        return {key: literally(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [literally(item) for item in value]
    if isinstance(value, str):
        return _INTERPOLATION.sub(lambda found: found[1] * 2 + "\\${", value)
    return value


def shown(value: Any) -> str:
    """``value`` in a remark or a message: one line, and never a long one.

    >>> shown("a" * 300)[-3:], shown(list(range(20)))
    ('...', '[0, 1, 2, 3, 4, 5, 6, 7, 12 more]')
    """
    if isinstance(value, list | tuple) and len(value) > _LONG_LIST:
        first = ", ".join(shown(item) for item in value[:_LONG_LIST])
        return f"[{first}, {len(value) - _LONG_LIST} more]"
    if isinstance(value, dict):
        return f"a mapping of {len(value)}" if value else "{}"
    words = {None: "null", True: "true", False: "false"}
    is_word = value is None or isinstance(value, bool)
    text = printable(words[value] if is_word else str(value))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def listed(names: Iterable[str]) -> str:
    """Names in a remark, each of them short."""
    return ", ".join(shown(name) for name in names)


def _because(why: str) -> str:
    return f"  # {printable(why)}" if why else ""
