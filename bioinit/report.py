"""Claims, problems and the receipt: what became of every tensor, for people and for programs.

A claim says what happens to one target: ``loaded``, ``skipped``, ``tied``, ``initialized`` or
``problem``. A plan is made of claims before anything is read; a report is the same claims after it
was done, with what loading alone could find out. Printing folds only equal facts and only unbroken
ranges, so a missing layer 5 shows as a gap.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from bioinit.errors import PlanError, Problem
from bioinit.keys import natural, numbers, template
from bioinit.layout import Dims

ClaimKind = Literal["loaded", "skipped", "tied", "initialized", "problem"]


class Claim(NamedTuple):
    """What becomes of one target.

    ``rule`` names the mapping rule, the prefix, the tie or the reason; ``init`` the initializer of
    whatever is not loaded; ``sources`` the stored names; ``bytes`` what is read from files for it;
    ``cast`` ``"bfloat16 -> float32"`` or None.
    """

    key: str
    shape: Dims
    dtype: str
    claim: ClaimKind
    rule: str
    sources: tuple[str, ...] = ()
    bytes: int = 0
    cast: str | None = None
    init: str | None = None

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "key": self.key,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "claim": self.claim,
            "rule": self.rule,
            "sources": list(self.sources),
            "bytes": self.bytes,
            "cast": self.cast,
        }
        if self.init is not None:
            document["init"] = self.init
        return document


class Unused(NamedTuple):
    """A stored tensor that no target wants.

    Where ``parts`` are named, only these of the canonical tensors that it holds: layers or experts
    that the model does not have.
    """

    key: str
    shape: Dims
    dtype: str
    parts: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        document = {"key": self.key, "shape": list(self.shape), "dtype": self.dtype}
        return document | ({"parts": list(self.parts)} if self.parts else {})

    @property
    def folded(self) -> list[str]:
        """The parts, unbroken ranges of numbers as one."""
        return [each.text for each in fold([Claim(p, (), "", "problem", "") for p in self.parts])]


@dataclass(frozen=True)
class LoadReport:
    """What loading did. Evidence first: ``problems`` are listed, nothing is raised by itself."""

    claims: tuple[Claim, ...]
    unused: tuple[Unused, ...]
    problems: tuple[Problem, ...]
    bytes_read: int
    seconds: float
    trainable: int
    """Elements of all parameters that require a gradient."""
    parameters: int
    """Elements of all parameters."""
    document: Callable[[], Mapping[str, Any]] = dict
    """Makes the plan's JSON, which the receipt extends."""
    remarks: tuple[str, ...] = ()
    """What the readers found that is no problem, but nobody would expect."""
    ranks: tuple[Mapping[str, Any], ...] = ()
    """What each of several ranks read, and into how much memory; ``bytes_read`` and ``seconds``
    are this one's."""

    def __repr__(self) -> str:
        return (
            f"<LoadReport: {summary(self.claims)}; {len(self.problems)} problems, "
            f"{human_bytes(self.bytes_read)} read in {self.seconds:.2f} s>"
        )

    def raise_for_problems(self) -> LoadReport:
        """Return this report, or raise.

        Raises:
            PlanError: the plan or the load has problems; all are in ``problems``.
        """
        raise_for(self.problems, "loading finished with")
        return self

    def to_json(self) -> dict[str, Any]:
        return {
            **self.document(),
            "tensors": [claim.to_json() for claim in self.claims],
            "unused": [tensor.to_json() for tensor in self.unused],
            "problems": [problem_json(problem) for problem in self.problems],
            "bytes_read": self._read,
            "seconds": round(self._took, 6),
            "trainable_parameters": self.trainable,
            "parameters": self.parameters,
            "remarks": list(self.remarks),
        } | ({"ranks": list(self.ranks)} if self.ranks else {})

    @property
    def _read(self) -> int:
        """Bytes that all ranks read."""
        return sum(each["bytes_read"] for each in self.ranks) if self.ranks else self.bytes_read

    @property
    def _took(self) -> float:
        """Seconds until the last of them was done."""
        return max((each["seconds"] for each in self.ranks), default=self.seconds)

    def render(self) -> str:
        """A few lines for a person: how many of each claim, bytes, seconds, trainable share."""
        lines = [summary(self.claims)]
        rate = self._read / max(self._took, 1e-9)
        by = f" by {len(self.ranks)} ranks" if self.ranks else ""
        lines.append(
            f"read {human_bytes(self._read)} in {self._took:.2f} s{by} "
            f"({human_bytes(int(rate))}/s); "
            f"{self.trainable:,} of {self.parameters:,} parameters are trainable"
        )
        lines.extend(printable(f"remark: {remark}") for remark in self.remarks)
        lines.extend(printable(f"problem: {problem}") for problem in self.problems)
        return "\n".join(lines)


_PLAN = "the plan has"


def raise_for(problems: Sequence[Problem], what: str, shown: int = 8) -> None:
    """Raise a :class:`PlanError` with ``problems``, if there are any.

    Of a plan the first ``shown``, for `bioinit plan` lists all; nothing else lists the others.
    """
    if not problems:
        return
    lines = [f"{what} {len(problems)} problem{'s' if len(problems) > 1 else ''}:"]
    shown = shown if what == _PLAN else len(problems)
    lines.extend(printable(f"  {problem}") for problem in problems[:shown])
    if len(problems) > shown:
        lines.append(f"  ... and {len(problems) - shown} more; `bioinit plan` lists all.")
    raise PlanError("\n".join(lines), problems)


def problem_json(problem: Problem) -> dict[str, str]:
    return {
        "kind": problem.kind,
        "key": problem.key,
        "message": problem.message,
        "cure": problem.cure,
    }


def dumps(document: Any) -> str:
    """One JSON document, keys in the order they were written.

    JSON has no word for infinity: such a float is spelled as a saved context spells it.

    >>> print(dumps([float("-inf")]).replace(chr(10), ""))
    [ {  "$float": "-inf" }]
    """
    said = _sayable(document)
    text = json.dumps(said, indent=1, ensure_ascii=False, default=str, allow_nan=False)
    # Half of a surrogate pair is no UTF-8; JSON spells it just so.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _sayable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, dict):
        return {
            repr(float(k)) if isinstance(k, float) else k: _sayable(v) for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_sayable(item) for item in value]
    return value


def printable(text: str) -> str:
    r"""One line as a terminal may get it: what is not to be seen is spelled out.

    Names come from checkpoints, and a terminal obeys what is in them: escape sequences, line ends,
    marks that turn the direction of writing.

    >>> printable("a" + chr(27) + "[2J" + chr(0x202E))
    'a\\x1b[2J\\u202e'
    """
    if text.isprintable():
        return text
    return "".join(c if _is_shown(c) else ascii(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """A message of ours of several lines, each of them :func:`printable`."""
    return "\n".join(map(printable, text.split("\n")))


def _is_shown(character: str) -> bool:
    return unicodedata.category(character)[0] != "C" and character not in "\u2028\u2029"


def human_bytes(count: int) -> str:
    """A byte count in binary units.

    >>> human_bytes(999), human_bytes(3 * 2**30)
    ('999 B', '3.0 GiB')
    """
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def summary(claims: Iterable[Claim]) -> str:
    """``41 loaded, 2 initialized, 1 tied``: how many targets have each claim."""
    counts: dict[str, int] = {}
    for claim in claims:
        counts[claim.claim] = counts.get(claim.claim, 0) + 1
    order = ("loaded", "tied", "skipped", "initialized", "problem")
    return ", ".join(f"{counts[kind]} {kind}" for kind in order if kind in counts) or "no tensors"


class Folded(NamedTuple):
    """Keys that share all facts: ``layers.{0..31}.w``, how many they are, and one of them."""

    text: str
    times: int
    first: Claim


def fold(claims: Sequence[Claim]) -> list[Folded]:
    """Claims with equal facts, their numbers folded into unbroken ranges.

    Two claims have equal facts when shape, dtype, claim, cast, initializer and the templates of
    their rule and sources agree. A range is unbroken or is not one: layers 0 to 4 and 6 to 9 are
    two lines.
    """
    groups: dict[Any, list[Claim]] = {}
    for claim in claims:
        facts = (
            template(claim.key),
            claim.shape,
            claim.dtype,
            claim.claim,
            claim.cast,
            claim.init,
            claim.rule,
            tuple(dict.fromkeys(map(template, claim.sources))),
        )
        groups.setdefault(facts, []).append(claim)
    folded: list[Folded] = []
    for facts, members in groups.items():
        if facts[0] == members[0].key:
            folded.extend(Folded(member.key, 1, member) for member in members)
            continue
        rows = [tuple((int(n), int(n)) for n in numbers(member.key)) for member in members]
        for ranges in _merge(rows):
            count = 1
            for low, high in ranges:
                count *= high - low + 1
            shown = iter(f"{{{a}..{b}}}" if a != b else str(a) for a, b in ranges)
            text = "".join(
                next(shown) if part == "*" else part for part in _split_stars(facts[0])
            ).replace("\\*", "*")
            first = next(m for m, r in zip(members, rows, strict=True) if _inside(r, ranges))
            folded.append(Folded(text, count, first))
    return sorted(folded, key=lambda f: natural(f.first.key))


Ranges = tuple[tuple[int, int], ...]


def _merge(rows: list[Ranges]) -> list[Ranges]:
    """Boxes of consecutive numbers that together cover exactly ``rows``, last position first."""
    for position in reversed(range(len(rows[0]))):
        by_rest: dict[Ranges, list[tuple[int, int]]] = {}
        for row in rows:
            rest = row[:position] + row[position + 1 :]
            by_rest.setdefault(rest, []).append(row[position])
        rows = []
        for rest, spans in by_rest.items():
            spans.sort()
            low, high = spans[0]
            for span in spans[1:]:
                if span[0] == high + 1:
                    high = span[1]
                else:
                    rows.append((*rest[:position], (low, high), *rest[position:]))
                    low, high = span
            rows.append((*rest[:position], (low, high), *rest[position:]))
    return sorted(rows)


def _inside(row: Ranges, ranges: Ranges) -> bool:
    return all(low <= n[0] <= high for n, (low, high) in zip(row, ranges, strict=True))


def _split_stars(pattern: str) -> list[str]:
    """``pattern`` cut into literal text and single ``*`` wildcards; escaped stars stay in text."""
    parts: list[str] = []
    literal = ""
    escaped = False
    for character in pattern:
        if character == "*" and not escaped:
            parts += [literal, "*"]
            literal = ""
        else:
            literal += character
        escaped = character == "\\"
    return [*parts, literal]


def render_claims(claims: Sequence[Claim], width: Callable[[str], str] = str) -> list[str]:
    """One line a folded group: key, count, shape, dtype, claim, and why."""
    lines = []
    for text, count, claim in fold(claims):
        times = f" x{count}" if count > 1 else ""
        shape = "x".join(map(str, claim.shape)) or "scalar"
        why = claim.rule if not claim.cast else f"{claim.rule}, cast {claim.cast}"
        if claim.init is not None and claim.init != claim.rule:
            why += f", initialized by {claim.init}"
        lines.append(width(f"{claim.claim:<12}{text}{times}  [{shape} {claim.dtype}]  {why}"))
    return lines
