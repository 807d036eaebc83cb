"""The loop that runs a pickle and can build nothing but plain values.

It is written out, instead of narrowing the one in the standard library, because that one calls what
it finds, writes attributes on anything and trusts every number. Here a call goes to a stand-in on
the table it was given or is not made, state goes into inert objects only, and no allocation is much
larger than the pickle itself.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from bioinit.errors import CorruptCheckpoint
from bioinit.unpickle.build import call, new, put, restore
from bioinit.unpickle.machine import Machine, Table, Truncated
from bioinit.unpickle.operations import RARE
from bioinit.unpickle.values import Opaque, Symbol

FEWEST_UNITS = 200_000
BYTES_PER_UNIT = 4
"""What is built may take a unit, some 64 bytes of memory, for each so many bytes of the pickle. The
places of many small chunks, which are dense, take a unit for seven."""
FILLED_DICT = 2
TOO_MANY = "far more objects are built than the pickle is long"
_UINT16 = struct.Struct("<H").unpack_from
_INT32 = struct.Struct("<i").unpack_from
_UINT32 = struct.Struct("<I").unpack_from


def run(data: bytes, start: int, table: Table, persistent: Callable[[Any], Any]) -> tuple[Any, int]:
    """The value of the pickle that begins at ``start``, and the position after it."""
    machine = Machine(data, start, table, persistent)
    try:
        return _loop(machine), machine.position
    except struct.error as error:
        raise Truncated("the pickle breaks off") from error
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        if machine.position >= len(data):
            raise Truncated("the pickle breaks off") from error
        raise CorruptCheckpoint(
            f"the pickle makes no sense near byte {machine.position}: "
            f"{type(error).__name__}: {error!s:.200}"
        ) from error
    except (MemoryError, RecursionError) as error:
        raise CorruptCheckpoint(
            f"the pickle asks for the impossible near byte {machine.position}: "
            f"{str(error)[:200] or type(error).__name__}"
        ) from error


def _loop(machine: Machine) -> Any:
    """Run to the STOP. What stands in checkpoints by the thousand is spelled out here."""
    data, stack, marks, memo = machine.data, machine.stack, machine.marks, machine.memo
    push, pop, rare, persistent = stack.append, stack.pop, RARE, machine.persistent
    position, size = machine.position, len(data)
    room = FEWEST_UNITS + (size - position) // BYTES_PER_UNIT
    try:
        while True:
            op = data[position]
            position += 1
            if op < 0x72:
                if op == 0x68:  # BINGET
                    push(memo[data[position]])
                    position += 1
                elif op == 0x4B:  # BININT1
                    push(data[position])
                    position += 1
                elif op == 0x6A:  # LONG_BINGET
                    push(memo[_UINT32(data, position)[0]])
                    position += 4
                elif op == 0x28:  # MARK
                    marks.append(len(stack))
                    room -= 1
                    if room < 0:
                        raise MemoryError(TOO_MANY)
                elif op == 0x29:  # EMPTY_TUPLE
                    push(())
                elif op == 0x52:  # REDUCE
                    args, function = pop(), pop()
                    room -= 1
                    if room < 0:
                        raise MemoryError(TOO_MANY)
                    if args and type(function) is Symbol and function.copies:
                        machine.pay(args)
                    push(call(function, args))
                elif op == 0x58:  # BINUNICODE
                    begin = position + 4
                    position = begin + _UINT32(data, position)[0]
                    if position > size:
                        raise Truncated("the pickle breaks off")
                    push(data[begin:position].decode("utf-8", "surrogatepass"))
                elif op == 0x71:  # BINPUT
                    machine.remember(data[position])
                    position += 1
                elif op == 0x4D:  # BININT2
                    push(_UINT16(data, position)[0])
                    position += 2
                elif op == 0x62:  # BUILD
                    state, target = pop(), stack[-1]
                    if type(target) is Opaque and type(state) is dict:
                        target.state = state
                    else:
                        restore(target, state)
                elif op == 0x51:  # BINPERSID
                    push(persistent(pop()))
                elif op == 0x4A:  # BININT
                    push(_INT32(data, position)[0])
                    position += 4
                elif op == 0x4E:  # NONE
                    push(None)
                elif op == 0x2E:  # STOP
                    value = pop()
                    if stack or marks:
                        raise CorruptCheckpoint("the pickle ends with more than one value")
                    return value
                else:
                    run_rare, units = rare[op]
                    room -= units
                    if room < 0:
                        raise MemoryError(TOO_MANY)
                    machine.position = position
                    run_rare(machine)
                    position = machine.position
            elif op == 0x94:  # MEMOIZE
                memo.append(stack[-1])
            elif op == 0x72:  # LONG_BINPUT
                index = _UINT32(data, position)[0]
                if index == len(memo):
                    memo.append(stack[-1])
                else:
                    machine.remember(index)
                position += 4
            elif op == 0x86:  # TUPLE2
                last = pop()
                push((pop(), last))
                room -= 1
                if room < 0:
                    raise MemoryError(TOO_MANY)
            elif op == 0x74:  # TUPLE
                mark = marks.pop()
                taken = tuple(stack[mark:])
                del stack[mark:]
                push(taken)
            elif op == 0x85:  # TUPLE1
                push((pop(),))
                room -= 1
                if room < 0:
                    raise MemoryError(TOO_MANY)
            elif op == 0x81:  # NEWOBJ
                args, function = pop(), pop()
                room -= 1
                if room < 0:
                    raise MemoryError(TOO_MANY)
                if args and type(function) is Symbol and function.copies:
                    machine.pay(args)
                push(new(function, args))
            elif op == 0x7D:  # EMPTY_DICT
                push({})
                room -= 1
                if room < 0:
                    raise MemoryError(TOO_MANY)
            elif op == 0x75:  # SETITEMS
                mark = marks.pop()
                pairs = stack[mark:]
                room -= FILLED_DICT
                if room < 0:
                    raise MemoryError(TOO_MANY)
                del stack[mark:]
                put(stack[-1], pairs)
            elif op == 0x89:  # NEWFALSE
                push(False)
            elif op == 0x8C:  # SHORT_BINUNICODE
                begin = position + 1
                position = begin + data[position]
                if position > size:
                    raise Truncated("the pickle breaks off")
                push(data[begin:position].decode("utf-8", "surrogatepass"))
            else:
                run_rare, units = rare[op]
                room -= units
                if room < 0:
                    raise MemoryError(TOO_MANY)
                machine.position = position
                run_rare(machine)
                position = machine.position
    finally:
        machine.position = position
