r"""Names of tensors: patterns that match keys, prefixes that skip them, and nearest names.

A *key* is a dotted state-dict name, ``encoder.layers.7.mlp.weight``. A *pattern* is a key in which
``*`` stands for exactly one segment and ``**`` for one or more; ``\*`` is a literal star (some
checkpoints have one in a name). What the wildcards caught is carried to the other side by position
in the text, left to right, never by rank: layer 5 stays layer 5 when layer 4 is absent.

>>> Pattern("layers.*.mlp.weight").rename("layers.7.mlp.weight", to=Pattern("blocks.*.w"))
'blocks.7.w'
>>> SkipPrefix("head").matches("head.weight"), SkipPrefix("head").matches("header.weight")
(True, False)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from bioinit.errors import ConfigError, MappingError

_TOKEN = re.compile(r"\\\*|\*\*|\*")
_REGEX_OF = {"*": r"([^.]+)", "**": r"(.+)", r"\*": r"\*"}


@dataclass(frozen=True)
class Pattern:
    """A key with wildcards. Immutable; holds no trace of what it has matched."""

    text: str

    @cached_property
    def wildcards(self) -> tuple[str, ...]:
        return tuple(token for token in _TOKEN.findall(self.text) if token != r"\*")

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        source, end = "", 0
        for token in _TOKEN.finditer(self.text):
            source += re.escape(self.text[end : token.start()]) + _REGEX_OF[token.group()]
            end = token.end()
        return re.compile(source + re.escape(self.text[end:]))

    def match(self, key: str) -> tuple[str, ...] | None:
        """What each wildcard caught, or None if the whole key does not match."""
        found = self._regex.fullmatch(key)
        return found.groups() if found else None

    def matching(self, keys: Iterable[str]) -> Iterator[str]:
        """Those of ``keys`` that match, in their order; for many keys of which few do."""
        end = self.end
        return (key for key in keys if key.endswith(end) and self.match(key) is not None)

    @property
    def end(self) -> str:
        """What every key that matches ends with."""
        return self._literals[-1]

    @cached_property
    def _literals(self) -> tuple[str, ...]:
        """The text around the wildcards, escaped stars as plain ones."""
        found, end = [""], 0
        for token in _TOKEN.finditer(self.text):
            found[-1] += self.text[end : token.start()]
            end = token.end()
            if token.group() == r"\*":
                found[-1] += "*"
            else:
                found.append("")
        found[-1] += self.text[end:]
        return tuple(found)

    def spell(self, captures: tuple[str, ...]) -> str:
        """The key that has ``captures`` in the place of the wildcards, left to right."""
        literals = self._literals
        text = literals[0]
        for capture, literal in zip(captures, literals[1:], strict=True):
            text += capture + literal
        return text

    def rename(self, key: str, *, to: Pattern) -> str | None:
        """Spell ``key`` the way ``to`` does, or None if it is not ours to rename.

        Raises:
            MappingError: the patterns differ in their wildcards, so nobody can say which capture
                goes where.
        """
        if self.wildcards != to.wildcards:
            raise MappingError(
                f"cannot rename {self.text!r} to {to.text!r}: their wildcards differ, "
                f"{list(self.wildcards)} against {list(to.wildcards)}. "
                "Give both sides the same wildcards in the same order."
            )
        captures = self.match(key)
        return None if captures is None else to.spell(captures)


@dataclass(frozen=True)
class SkipPrefix:
    """A prefix of keys, on whole dotted segments unless it ends in ``*``.

    Raises:
        ConfigError: the prefix is empty; it would skip every key without a word.
    """

    text: str

    def __post_init__(self) -> None:
        if not self.text.strip("."):
            raise ConfigError(
                f"the skip prefix {self.text!r} is empty and would skip every key. "
                "Write '*' to skip everything, or name a prefix."
            )

    def matches(self, key: str) -> bool:
        if self.text.endswith("*"):
            return key.startswith(self.text[:-1])
        whole = self.text.rstrip(".")
        return key.startswith(whole) and key[len(whole) : len(whole) + 1] in ("", ".")


def escape(key: str) -> str:
    """The pattern that matches ``key`` and nothing else."""
    return key.replace("*", r"\*")


def template(key: str) -> str:
    r"""The pattern of ``key`` with each purely numeric segment as a wildcard.

    >>> template("layers.3.experts.12.w1"), template("attn.*.inv_freq")
    ('layers.*.experts.*.w1', 'attn.\\*.inv_freq')
    """
    if "*" in key:
        key = escape(key)
    return ".".join(["*" if part.isdecimal() else part for part in key.split(".")])


def loosened(pattern: str) -> str:
    """``pattern`` with each purely numeric segment as a wildcard too.

    >>> loosened("blocks.*.0.weight")
    'blocks.*.*.weight'
    """
    return ".".join(["*" if part.isdecimal() else part for part in pattern.split(".")])


def numbers(key: str) -> tuple[str, ...]:
    """The numeric segments of ``key``, which are the captures of its :func:`template`."""
    return tuple([part for part in key.split(".") if part.isdecimal()])


def natural(key: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key under which ``layers.2`` comes before ``layers.10``."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split("."))


def closest(name: str, names: Iterable[str], limit: int = 3) -> list[str]:
    """Up to ``limit`` of ``names`` that look like ``name``, best first."""
    return difflib.get_close_matches(name, list(names), n=limit, cutoff=0.6)


def suggestion(name: str, names: Iterable[str]) -> str:
    """A sentence that offers the closest names, or an empty string.

    >>> suggestion("num_layer", ["num_layers", "vocab_size"])
    "Closest: 'num_layers'."
    """
    found = closest(name, names)
    return f"Closest: {', '.join(map(repr, found))}." if found else ""
