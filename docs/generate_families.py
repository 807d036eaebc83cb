"""Writes ``families.md``: which tensor and which field of a family is which, in every dialect.

    python docs/generate_families.py > docs/families.md

The tables are read off the rules that load and convert, for the smallest config of each family, so
they cannot say anything else. A test holds the page against them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from bioinit import families
from bioinit.families.protocol import Canonical, Dialect, Family
from bioinit.keys import template
from bioinit.layout import Dims
from bioinit.rules import Each, Narrow, Part, Permute, Reinterpret, Rule, Unflatten

INTRODUCTION = """# Families: names, layouts and fields in every dialect

A family has one canonical space; each dialect is a table that leads there and back. A `*` stands
for the number of a layer or an expert, and `BODY.` for what transformers puts before the body
(`model.`, `esm.`, `bert.`, ... or nothing). *Written* is the spelling that `bioinit convert`
writes; every name in *read as well* is read, with the layout that its shape tells.

Where a layout is more than another name, it says how: `rows as (2, 4, 8), [2, 3) of dim 1` is a
part of a dim that was split, *stacked* means that one tensor holds all layers on its first dim,
*padded* that rows beyond the vocabulary are zero and dropped. Sizes are those of a small config: 2
layers, hidden 32, 4 heads in 2 groups, 48 in the MLP, 4 experts.

This page is made by `python docs/generate_families.py > docs/families.md` from the rules.
"""
SMALL = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 96,
    "seq_length": 64,
    "num_moe_experts": 4,
}


def small(family: Family) -> Any:
    """The config for which the tables are shown."""
    cls: Any = family.config
    given = {name: value for name, value in SMALL.items() if name in cls.__dataclass_fields__}
    return cls(**given)


def page() -> str:
    """The whole page."""
    named = [(name, families.load(name)) for name in families.names()]
    parts = [INTRODUCTION]
    for name, family in named:
        if family.dialects and family.tensors is not None:
            parts.append("\n".join(section(name, family)))
    return "\n".join(parts)


def section(name: str, family: Family) -> Iterator[str]:
    """One family: its tensors, then its fields."""
    config = small(family)
    doc = (sys.modules[type(config).__module__].__doc__ or "").strip().splitlines()[0]
    yield f"## {name}\n\n{doc}\n"
    assert family.tensors is not None
    canonical = family.tensors(config)
    yield f"Dialects: {', '.join(family.dialects)}."
    written = [key for key, dialect in family.dialects.items() if dialect.write is not None]
    yield f"Written: {', '.join(written)}.\n"
    told: dict[tuple[str, ...], str] = {}
    for key, dialect in family.dialects.items():
        rules = tuple(dialect.rules(config, {}, "BODY."))
        lines = tuple(rows(rules, canonical))
        if lines in told:
            yield f"### {name}: {key}\n\nThe same tensors as {told[lines]}.\n"
            continue
        told[lines] = key
        yield f"### {name}: {key}\n"
        yield "| canonical | written | read as well |\n|---|---|---|"
        yield from lines
        yield ""
        gone = [rule for rule in rules if not rule.parts]
        if gone:
            yield "Known and not needed: " + ", ".join(
                f"`{rule.pattern_text}` ({rule.note})" for rule in gone
            )
            yield ""
    yield from fields(name, family.dialects)


def rows(rules: Iterable[Rule], canonical: dict[str, Canonical]) -> Iterator[str]:
    """A row per kind of canonical tensor."""
    kinds: dict[str, tuple[str, Canonical]] = {}
    for key, tensor in canonical.items():
        kinds.setdefault(template(key), (key, tensor))
    for kind, (key, tensor) in kinds.items():
        found = [
            (rule, part)
            for rule in rules
            for part in rule.parts
            if part.pattern.match(key) is not None
        ]
        kept = "" if tensor.kind == "needed" else f" ({tensor.kind})"
        first = "not there"
        if found:
            rule, part = found[0]
            first = f"`{rule.pattern_text}`{how(rule, part)}"
        others = dict.fromkeys(
            f"`{rule.pattern_text}`" + (how(rule, part) if is_turned(part) else "")
            for rule, part in found[1:]
        )
        yield f"| `{kind}`{kept} | {first} | {', '.join(others)} |"


def is_turned(part: Part) -> bool:
    """Whether the layout is another one than that of the spelling that is written."""
    return any(isinstance(op, Permute | Reinterpret) for op in part.ops)


def how(rule: Rule, part: Part) -> str:
    """What more than a name the rule changes, in a few words."""
    words: list[str] = []
    sizes: Dims = ()
    for op in part.ops:
        if isinstance(op, Each):
            words.append("experts on a dim" if op.wildcard else "stacked")
        elif isinstance(op, Reinterpret):
            words.append(f"read as {op.now}")
        elif isinstance(op, Permute):
            words.append("transposed")
        elif isinstance(op, Unflatten):
            sizes = op.sizes
            words.append(f"rows as {op.sizes}")
        elif isinstance(op, Narrow):
            if rule.fill:
                words.append("padded")
            else:
                of = f" of dim {op.dim}" if sizes else ""
                words.append(f"[{op.start}, {op.start + op.length}){of}")
    if part.add:
        words.append(f"stored {-part.add:+g}")
    if rule.shift:
        words.append(f"numbers {-rule.shift:+d}")
    return f" ({', '.join(words)})" if words else ""


def fields(name: str, dialects: dict[str, Dialect] | Any) -> Iterator[str]:
    """Which field is which."""
    shown = {key: dialect.fields for key, dialect in dialects.items() if dialect.fields}
    if not shown:
        return
    shown = {
        key: {theirs: own.split(", ") for theirs, own in table.items()}
        for key, table in shown.items()
    }
    ours = dict.fromkeys(
        one for table in shown.values() for own in table.values() for one in own if one
    )
    yield f"### {name}: fields\n"
    yield f"| field | {' | '.join(shown)} |\n|---|{'---|' * len(shown)}"
    for field in ours:
        cells = [
            ", ".join(f"`{theirs}`" for theirs, own in table.items() if field in own)
            for table in shown.values()
        ]
        yield f"| `{field}` | {' | '.join(cells)} |"
    yield ""


if __name__ == "__main__":
    print(page(), end="")
