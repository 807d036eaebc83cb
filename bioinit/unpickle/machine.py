"""What a running pickle works with: its bytes, a stack, what it remembers, the names it met."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from typing import Any

from bioinit.errors import CorruptCheckpoint
from bioinit.unpickle.values import Symbol

Table = Mapping[tuple[str, str], Any]
"""What stands for (module, name): a :class:`Symbol` with a stand-in to call, or a plain value."""

COPIES_PER_BYTE = 16
_PY2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class Truncated(CorruptCheckpoint):
    """The bytes end before the pickle does."""


class Machine:
    __slots__ = (
        "budget",
        "data",
        "marks",
        "memo",
        "persistent",
        "position",
        "stack",
        "symbols",
        "table",
    )

    def __init__(
        self, data: bytes, start: int, table: Table, persistent: Callable[[Any], Any]
    ) -> None:
        self.data = data
        self.position = start
        self.table = table
        self.budget = COPIES_PER_BYTE * len(data)
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.symbols: dict[tuple[str, str], Any] = {}

    def remember(self, index: int) -> None:
        """Keep the top of the stack under ``index``, which no pickle lets run ahead of its size."""
        if not 0 <= index <= len(self.data):
            raise MemoryError(f"it keeps a value under the number {index}")
        if index >= len(self.memo):
            self.memo.extend([None] * (index + 1 - len(self.memo)))
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        """Push what is kept under ``index``."""
        if index < 0:
            raise IndexError(f"a value under the number {index} is asked for")
        self.stack.append(self.memo[index])

    def pay(self, args: Any) -> None:
        """Count what a call copies: one large list, copied often, fills any memory."""
        self.budget -= sum(len(arg) for arg in args if isinstance(arg, Sized))
        if self.budget < 0:
            raise MemoryError("far more is copied than the pickle holds")

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        end = self.position + size
        if size < 0 or end > len(self.data):
            raise Truncated("the pickle breaks off")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def line(self) -> bytes:
        """The rest of the line."""
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise Truncated("the pickle breaks off")
        taken = self.data[self.position : end]
        self.position = end + 1
        return taken

    def number(self, unpack: Callable[..., tuple[Any, ...]], size: int) -> Any:
        """A number of ``size`` bytes."""
        value = unpack(self.data, self.position)[0]
        self.position += size
        return value

    def since_mark(self) -> list[Any]:
        """Everything above the last mark, taken from the stack."""
        mark = self.marks.pop()
        taken = self.stack[mark:]
        del self.stack[mark:]
        return taken

    def symbol(self, module: Any, name: Any) -> None:
        """Push what stands for a name: always the same object for the same name."""
        if type(module) is not str or type(name) is not str:
            raise TypeError("a global name is not text")
        key = (_PY2_MODULES.get(module, module), name)
        found = self.symbols.get(key, self)
        if found is self:
            found = self.symbols[key] = self.table[key] if key in self.table else Symbol(*key)
        self.stack.append(found)
