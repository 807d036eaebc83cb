"""Rules written as YAML: a mapping in a file that anybody may send, for no code comes with it.

    rules:                                     # how the checkpoint's tensors lie
      - {from: "body.*.wq.weight", to: "encoder.*.q.weight"}
      - from: "body.*.kv.weight"
        parts:
          - {to: "encoder.*.k.weight", view: [{narrow: [0, 0, 8]}]}
          - {to: "encoder.*.v.weight", view: [{narrow: [0, 8, 8]}]}
      - {drop: "body.rotary.inv_freq", because: "computed"}
      - {from: "**", to: "**"}                 # everything else keeps its name
    model:                                     # how the model's own do; by default as they are
      - {from: "encoder.*.q.weight", to: "encoder.*.q.weight", view: [{unflatten: [0, [2, 4]]}]}

The words are those of :mod:`bioinit.rules`; the first rule that knows a name decides. What is not
understood is an error that offers the closest word.
"""

from __future__ import annotations

import reprlib
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from bioinit.errors import MappingError, StorageError
from bioinit.keys import suggestion
from bioinit.mapping import Mapping as Table
from bioinit.mapping import Names
from bioinit.rules import (
    Each,
    Narrow,
    Operation,
    Part,
    Permute,
    Reinterpret,
    Rule,
    Unflatten,
    dropped,
    rename,
    stacked,
)

_RULE = ("from", "to", "view", "add", "parts", "note", "fill", "stacked", "drop", "because")
_PART = ("to", "view", "add")
_LARGEST = 16 << 20


def read(source: str | Path | Mapping[str, Any]) -> Names:
    """The tables of a file, or of what such a file says as plain data.

    Raises:
        StorageError: there is no such file, or it cannot be read.
        MappingError: it says something that rules cannot mean.
    """
    if not isinstance(source, Mapping):
        return _tables(_parsed(Path(source).expanduser(), str(source)), str(source))
    return _tables(source, "mapping")


def _parsed(path: Path, shown: str) -> Any:
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode) or state.st_size > _LARGEST:
            raise StorageError(
                f"{shown} is no file of rules: it is no ordinary file, or has more than "
                f"{_LARGEST >> 20} MiB. Give the path of a YAML file."
            )
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MappingError(f"{shown} is not UTF-8 text: {error}. Save it as UTF-8.") from None
    except (OSError, ValueError) as error:  # a NUL in a path is no error of the system
        reason = error.strerror if isinstance(error, OSError) else error
        raise StorageError(
            f"cannot read the rules in {shown} (looked at {path.absolute()}): {reason}. "
            "Give the path of a YAML file."
        ) from None
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise MappingError(
            f"{shown} is not valid YAML: {error}. A pattern that begins with a star needs quotes."
        ) from None


class _Loader(yaml.SafeLoader):
    """Plain data alone, and no word twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        words = [key.value for key, _ in node.value]
        twice = sorted({str(word) for word in words if words.count(word) > 1})
        if twice:
            raise yaml.MarkedYAMLError(
                problem=f"{twice[0]!r} stands there twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


def _tables(data: Any, shown: str) -> Names:
    found = _words(data, ("rules", "model"), shown, needs=("rules",))
    disk = _lines(found["rules"], f"{shown}: rules")
    memory = _lines(found.get("model", []), f"{shown}: model")
    if not disk:
        raise MappingError(
            f"{shown}: rules is empty, so no stored tensor has a name. Write at least "
            "{from: '**', to: '**'}."
        )
    return Names(Table(disk), Table([*memory, rename("**", "**")]))


def _lines(data: Any, at: str) -> list[Rule]:
    return [_rule(line, f"{at}[{n}]") for n, line in enumerate(_list(data, at))]


def _rule(data: Any, at: str) -> Rule:
    found = _words(data, _RULE, at)
    if "drop" in found:
        _alone(found, "drop", ("because",), at)
        return _made(at, dropped, _text(found, "drop", at), _text(found, "because", at))
    if "because" in found:
        raise MappingError(f"{at}: because says why a tensor is dropped. Write drop, or note.")
    key = _text(found, "from", at)
    if "parts" in found:
        _alone(found, "parts", ("from", "note", "fill", "stacked"), at)
        parts = [_part(p, f"{at}.parts[{n}]") for n, p in enumerate(_list(found["parts"], at))]
        if not parts:
            raise MappingError(f"{at}: parts is empty. Write drop for what is not needed.")
    else:
        parts = [_part({word: found[word] for word in _PART if word in found}, at)]
    note = _text(found, "note", at) if "note" in found else ""
    rule = _made(at, Rule, key, tuple(parts), note, _bool(found, "fill", at))
    if _bool(found, "stacked", at):
        if not rule.pattern.wildcards:
            raise MappingError(
                f"{at}: {key!r} is stacked, but has no wildcard that the new dim could stand for. "
                "Write the name of one layer, with a star for its number."
            )
        return _made(at, stacked, rule)
    return rule


def _part(data: Any, at: str) -> Part:
    found = _words(data, _PART, at)
    view = _list(found.get("view", []), f"{at}.view")
    steps = tuple(_operation(step, f"{at}.view[{n}]") for n, step in enumerate(view))
    add = found.get("add", 0.0)
    if isinstance(add, bool) or not isinstance(add, int | float):
        raise MappingError(f"{at}: add is {add!r}. Write a number.")
    return Part(_text(found, "to", at), steps, float(add))


def _unflatten(values: list[Any], at: str) -> Operation:
    dim, sizes = _shaped(values, at, "[dim, [sizes]]", 2)
    return Unflatten(_whole(dim, at), _wholes(sizes, at))


def _permute(values: list[Any], at: str) -> Operation:
    dims = _wholes(values, at)
    if sorted(dims) != list(range(len(dims))):
        raise MappingError(f"{at}: permute {list(dims)} must name every dim from 0 on, once.")
    return Permute(dims)


def _narrow(values: list[Any], at: str) -> Operation:
    return Narrow(*_wholes(_shaped(values, at, "[dim, start, length]", 3, 4), at))


def _each(values: list[Any], at: str) -> Operation:
    return Each(*_wholes(_shaped(values, at, "[dim, wildcard]", 2, 3), at))


def _reinterpret(values: list[Any], at: str) -> Operation:
    was, now = _shaped(values, at, "[[sizes], [sizes]]", 2)
    return Reinterpret(_wholes(was, at), _wholes(now, at))


_VERBS: Mapping[str, Callable[[list[Any], str], Operation]] = {
    "unflatten": _unflatten,
    "permute": _permute,
    "narrow": _narrow,
    "each": _each,
    "reinterpret": _reinterpret,
}


def _operation(data: Any, at: str) -> Operation:
    found = _words(data, tuple(_VERBS), at)
    if len(found) != 1:
        raise MappingError(
            f"{at} has {len(found)} words. Write one step of the view per line, in order."
        )
    [(verb, values)] = found.items()
    return _VERBS[verb](_list(values, f"{at}.{verb}"), f"{at}.{verb}")


def _words(
    data: Any, known: tuple[str, ...], at: str, needs: tuple[str, ...] = ()
) -> Mapping[str, Any]:
    """``data`` as a mapping that has words of ``known`` alone."""
    if not isinstance(data, Mapping):
        raise MappingError(f"{at} is {_shown(data)}. Write a mapping of: {', '.join(known)}.")
    for word in data:
        if word not in known:
            closest = suggestion(str(word), known) or f"There are {', '.join(known)}."
            raise MappingError(f"{at} has the unknown word {word!r}. {closest}")
    for word in needs:
        if word not in data:
            raise MappingError(f"{at} lacks {word!r}. Write it.")
    return data


def _alone(found: Mapping[str, Any], word: str, beside: tuple[str, ...], at: str) -> None:
    others = [each for each in found if each not in (word, *beside)]
    if others:
        raise MappingError(
            f"{at} has {others[0]!r} beside {word!r}, which only goes with {', '.join(beside)}. "
            "Remove one of them."
        )


def _text(found: Mapping[str, Any], word: str, at: str) -> str:
    value = found.get(word)
    if not isinstance(value, str) or not value.strip():
        what = f"{word!r} is {_shown(value)}" if word in found else f"{word!r} is missing"
        raise MappingError(f"{at}: {what}. Write text, in quotes where it has a star.")
    return value


def _bool(found: Mapping[str, Any], word: str, at: str) -> bool:
    value = found.get(word, False)
    if not isinstance(value, bool):
        raise MappingError(f"{at}: {word!r} is {_shown(value)}. Write true or false.")
    return value


def _list(data: Any, at: str) -> list[Any]:
    if not isinstance(data, list | tuple):
        raise MappingError(f"{at} is {_shown(data)}. Write a list.")
    return list(data)


def _shaped(values: list[Any], at: str, form: str, *counts: int) -> list[Any]:
    if len(values) not in counts:
        raise MappingError(f"{at} has {len(values)} values. Write {form}.")
    return values


def _wholes(values: Any, at: str) -> tuple[int, ...]:
    return tuple(_whole(value, at) for value in _list(values, at))


def _whole(value: Any, at: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise MappingError(f"{at} holds {_shown(value)}. Write whole numbers from 0 on.")
    return value


def _made(at: str, make: Callable[..., Rule], *arguments: Any) -> Rule:
    try:
        return make(*arguments)
    except MappingError as error:
        raise MappingError(f"{at}: {error}") from None


def _shown(value: Any) -> str:
    return "nothing" if value is None else reprlib.repr(value)
