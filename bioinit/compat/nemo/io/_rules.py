"""What decides what a connector makes, beside its source: its code, and what it was told.

Code is known by its text: the connector's class, and everything at the top of its module, or of
another one of the same people's, that this text names, and so on. What is installed is not looked
into. Nothing is imported or run for it, so a counter or a cache of theirs changes nothing.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.machinery
import importlib.util
import io
import logging
import re
import sys
import sysconfig
import threading
import tokenize
import uuid
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path, PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import fiddle as fdl
import numpy as np
import torch

_INSTALLED = ("site-packages", "dist-packages")
_OF_APPLY = "_bioinit_of_apply"
_NOT_TOLD = ("address", "LOCK_TIMEOUT", _OF_APPLY)
_AN_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_NOT_ALL = re.compile(r" at 0x|\.\.\.|tensor\(|array\(")
"""What a text that says of a value less than there is has in it."""
_PARSING = threading.Lock()
"""Python 3.11 may fail with a SystemError where two threads parse at once."""
_Lock = type(threading.Lock()) | type(threading.RLock())
_PLAIN = (type(None), bool, int, float, complex, str, bytes, range)


def rules_of(connector: Any, kwargs: Mapping[str, Any]) -> dict[str, str]:
    """The digests of ``connector``'s code, and of what it and its ``apply`` were told."""
    kind = type(connector)
    code = _Code(kind.__module__.partition(".")[0])
    for each in kind.__mro__:
        code.add_class(each)
    lazy = {
        name
        for each in kind.__mro__
        for name, value in vars(each).items()
        if isinstance(value, functools.cached_property)
    }
    left_out = lazy.union(_NOT_TOLD, vars(connector).get(_OF_APPLY, ()))
    own = {name: value for name, value in vars(connector).items() if name not in left_out}
    told = _Told(code)
    told.add([sorted(own), sorted(kwargs)])
    for values in (own, kwargs):
        for name in sorted(values):
            told.add(values[name])
    return {"connector": name_of(kind), "rules": code.digest(), "arguments": told.digest()}


@contextmanager
def not_told(connector: Any) -> Iterator[None]:
    """What the block sets of ``connector`` is none of what it was told, from then on."""
    before = dict(vars(connector))
    try:
        yield
    finally:
        now = vars(connector)
        changed = {name for name in now if name not in before or now[name] is not before[name]}
        setattr(connector, _OF_APPLY, changed | before.get(_OF_APPLY, set()))


def name_of(kind: type) -> str:
    """The dotted name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


class _Module(NamedTuple):
    """The text of a module, and which statements at its top bind a name."""

    package: str
    lines: list[str]
    bound: dict[str, list[ast.stmt]]


class _Code:
    """The text of some classes, and of what it names."""

    def __init__(self, home: str) -> None:
        self._home = home
        self._modules: dict[str, _Module | None] = {}
        self._said: dict[tuple[str, str], str] = {}

    def digest(self) -> str:
        said = sorted((*names, text) for names, text in self._said.items())
        return hashlib.sha256(repr(said).encode("utf-8", "surrogatepass")).hexdigest()

    def add_class(self, kind: type) -> None:
        """``kind`` and what it uses."""
        self._add(kind.__module__, kind.__qualname__.partition(".")[0])
        if _is_typed(kind.__module__):
            for value in vars(kind).values():
                self._add_typed(getattr(value, "__func__", value))

    def add_function(self, function: FunctionType) -> None:
        """``function`` and what it uses."""
        self._add(function.__module__, function.__qualname__.partition(".")[0])

    def _add(self, module_name: str, name: str) -> None:
        """What ``name`` is at the top of a module, and what that uses."""
        todo = [(module_name, name)]
        while todo:
            where, name = key = todo.pop()
            module = self._module(where)
            if module is None or key in self._said:
                continue
            statements = module.bound.get(name, [])
            self._said[key] = "\n".join(_text(module, one) for one in statements)
            for statement in statements:
                for node in ast.walk(statement):
                    if isinstance(node, ast.Name):
                        todo.append((where, node.id))
                    elif isinstance(node, ast.Import):
                        todo += (used for alias in node.names for used in self._all_of(alias.name))
                    elif isinstance(node, ast.ImportFrom):
                        # At the top only what is asked for; in a function, all of it.
                        wanted = name if node is statement else None
                        todo += self._imported(node, module.package, wanted)

    def _imported(
        self, node: ast.ImportFrom, package: str, wanted: str | None
    ) -> Iterator[tuple[str, str]]:
        try:
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
        except ImportError:
            return
        for alias in node.names:
            if alias.name == "*":
                yield from self._all_of(source)
            elif wanted is None or wanted == (alias.asname or alias.name):
                yield source, alias.name
                yield from self._all_of(f"{source}.{alias.name}")

    def _all_of(self, module_name: str) -> Iterator[tuple[str, str]]:
        module = self._module(module_name)
        yield from () if module is None else ((module_name, name) for name in module.bound)

    def _module(self, name: str) -> _Module | None:
        """The module ``name``, if it was written by the people who wrote the connector."""
        if name not in self._modules:
            path, is_package = _file_of(name)
            is_theirs = path is not None and self._is_theirs(name, path)
            package = name if is_package else name.rpartition(".")[0]
            self._modules[name] = _read(path, package) if path and is_theirs else None
        return self._modules[name]

    def _is_theirs(self, name: str, path: Path) -> bool:
        top = name.partition(".")[0]
        if top == "bioinit":
            return False
        is_installed = not {*path.parts}.isdisjoint(_INSTALLED)
        is_standard = path.is_relative_to(sysconfig.get_path("stdlib"))
        return top == self._home or not (is_installed or is_standard)

    def _add_typed(self, value: Any) -> None:
        """A function that no file has, and what it uses."""
        if not isinstance(value, FunctionType):
            return
        if not _is_typed(value.__module__):
            self.add_function(value)
            return
        key = "", value.__qualname__
        if key in self._said:
            return
        self._said[key] = repr(list(_bytecode(value.__code__)))
        for name in value.__code__.co_names:
            used = value.__globals__.get(name)
            if isinstance(used, str | tuple | dict):  # a table of names
                self._said[f" {name}", ""] = _AN_ADDRESS.sub("", repr(used))
            for inner in (used, *getattr(used, "__dict__", {}).values()):  # of a transform
                self._add_typed(inner)


class _Told:
    """A digest of values: what is told apart in any way has another one."""

    def __init__(self, code: _Code) -> None:
        self._code = code
        self._hash = hashlib.sha256()
        self._within: list[int] = []

    def digest(self) -> str:
        return self._hash.hexdigest()

    def add(self, value: Any) -> None:
        kind = type(value)
        self._put(name_of(kind))
        if isinstance(value, _PLAIN):
            self._put(repr(value))
        elif isinstance(value, PurePath):
            self._put(str(value))
        elif id(value) in self._within:
            self._put(f"{self._within.index(id(value))}")
        else:
            self._within.append(id(value))
            try:
                self._add_object(value)
            except RecursionError:
                self._put(uuid.uuid4().hex)
            finally:
                self._within.pop()

    def _add_object(self, value: Any) -> None:
        if isinstance(value, Mapping):
            self._add_each(part for item in value.items() for part in item)
        elif isinstance(value, Sequence):
            self._add_each(iter(value))
        elif isinstance(value, Set):
            self._put(repr(sorted(self._alone(one) for one in value)))
        elif isinstance(value, torch.Tensor):
            self._add_tensor(value)
        elif isinstance(value, np.ndarray):
            self._add_each(iter((str(value.dtype), value.shape, value.tolist())))
        elif isinstance(value, fdl.Buildable):
            self._add_each(iter((value.__fn_or_cls__, value.__arguments__)))
        elif isinstance(value, functools.partial):
            self._add_each(iter((value.func, value.args, value.keywords)))
        elif isinstance(value, MethodType):
            self._add_each(iter((value.__func__, value.__self__)))
        elif isinstance(value, FunctionType):
            self._add_function(value)
        elif isinstance(value, type):
            self._put(name_of(value))
            self._code.add_class(value)
        elif isinstance(value, ModuleType | BuiltinFunctionType):
            self._put(f"{value.__name__} {getattr(value, '__module__', None)}")
        elif isinstance(value, logging.Logger | io.IOBase | _Lock):
            pass  # of no matter for what is made
        elif getattr(value, "__dict__", None):
            self._code.add_class(type(value))
            self._add_each(part for item in vars(value).items() for part in item)
        elif dataclasses.is_dataclass(value):  # with slots
            self._code.add_class(type(value))
            self._add_each(getattr(value, one.name, None) for one in dataclasses.fields(value))
        else:  # what does not say all of itself is never the same
            said = repr(value)
            self._put(uuid.uuid4().hex if _NOT_ALL.search(said) else said)

    def _add_each(self, values: Iterator[Any]) -> None:
        for value in values:
            self.add(value)
        self._put("end")

    def _add_function(self, value: FunctionType) -> None:
        self._code.add_function(value)
        self._put(f"{value.__module__}.{value.__qualname__}")
        self._put(repr(list(_bytecode(value.__code__))))
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_full(cell)]
        self._add_each(iter((cells, value.__defaults__, value.__kwdefaults__)))

    def _add_tensor(self, value: torch.Tensor) -> None:
        self._put(f"{value.dtype} {tuple(value.shape)} {value.device.type == 'meta'}")
        if value.device.type != "meta":
            dense = value.detach() if value.layout is torch.strided else value.detach().to_dense()
            dense = (
                dense.to("cpu")
                .resolve_conj()
                .resolve_neg()
                .contiguous()
                .reshape(-1)
                .view(torch.uint8)
            )
            self._hash.update(dense.numpy().data)

    def _alone(self, value: Any) -> str:
        alone = _Told(self._code)
        alone.add(value)
        return alone.digest()

    def _put(self, text: str) -> None:
        said = text.encode("utf-8", "surrogatepass")
        self._hash.update(b"%d:" % len(said) + said)


def _file_of(name: str) -> tuple[Path | None, bool]:
    """The file of a module, whether it has been imported or not; and whether it is a package."""
    loaded = sys.modules.get(name)
    file = getattr(loaded, "__file__", None)
    if file is not None:
        return (Path(file) if file.endswith(".py") else None), hasattr(loaded, "__path__")
    if name == "__main__":
        return None, False
    spec, path = None, None
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[:count]), path)
        if spec is None:
            return None, False
        path = spec.submodule_search_locations
    is_text = spec is not None and spec.origin is not None and spec.origin.endswith(".py")
    return (Path(spec.origin) if spec and spec.origin and is_text else None), path is not None


def _is_typed(module_name: str) -> bool:
    """Whether no file has the text of a module: it was typed in, as in a notebook."""
    loaded = sys.modules.get(module_name)
    return getattr(loaded, "__file__", None) is None and _file_of(module_name)[0] is None


def _read(path: Path, package: str) -> _Module | None:
    try:
        with tokenize.open(path) as file:
            text = file.read()
        with _PARSING:
            tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError):
        return None
    bound: dict[str, list[ast.stmt]] = {}
    for statement in _at_the_top(tree.body):
        for name in _binds(statement):
            bound.setdefault(name, []).append(statement)
    return _Module(package, text.splitlines(), bound)


def _at_the_top(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements outside of functions and classes; of an ``if`` or ``try``, those in it."""
    for statement in body:
        inner = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
        inner += [handler.body for handler in getattr(statement, "handlers", [])]
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement
        elif any(inner):
            for part in inner:
                yield from _at_the_top(part)
        else:
            yield statement


def _binds(statement: ast.stmt) -> Iterator[str]:
    """The names that ``statement`` binds, or changes something of."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        for alias in statement.names:
            yield alias.asname or alias.name.partition(".")[0]
    elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for target in targets:
            names = (node.id for node in ast.walk(target) if isinstance(node, ast.Name))
            yield from dict.fromkeys(names)


def _text(module: _Module, statement: ast.stmt) -> str:
    decorators = getattr(statement, "decorator_list", [])
    first = min(node.lineno for node in (statement, *decorators))
    return "\n".join(module.lines[first - 1 : statement.end_lineno])


def _bytecode(code: CodeType) -> Iterator[str]:
    yield from (code.co_code.hex(), repr(code.co_names))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _bytecode(constant)
        else:
            yield repr(constant)


def _is_full(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
