"""The closed list: every name in a pickle that stands for something, and what it stands for.

Each entry is either a plain value (a dtype) or a :class:`Symbol` with our own function to call in
place of the named one. What is not here is never called. The functions take what the pickle gives
them and return plain values; they raise ``TypeError`` or ``ValueError`` for anything else.
"""

from __future__ import annotations

import datetime
import decimal
import pathlib
import re
from collections.abc import Callable
from typing import Any

import torch

from bioinit.errors import RefusedCheckpoint
from bioinit.unpickle.build import KEY_BITS, LONGEST_KEY, checked, extend, new, put
from bioinit.unpickle.values import Opaque, Refused, StorageRef, Symbol, TensorRef

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}
ENUMERATIONS = (
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.planner", "LoadItemType"),
    ("torch.distributed.checkpoint.planner", "WriteItemType"),
    ("megatron.core.enums", "ModelType"),
    ("megatron.core.transformer.enums", "AttnBackend"),
    ("megatron.core.transformer.enums", "AttnMaskType"),
    ("megatron.core.transformer.enums", "AttnType"),
    ("megatron.core.transformer.enums", "LayerType"),
    ("megatron.core.transformer.enums", "ModelType"),
    ("transformers.trainer_utils", "HubStrategy"),
    ("transformers.trainer_utils", "IntervalStrategy"),
    ("transformers.trainer_utils", "SaveStrategy"),
    ("transformers.trainer_utils", "SchedulerType"),
    ("transformers.training_args", "OptimizerNames"),
)
NUMPY_SCALAR = re.compile(r"[<>=|]?[biufc]\d{0,2}")


def storage_ref(pid: Any) -> Any:
    """The storage a persistent id names; what a class is saved under in old files is dropped."""
    if type(pid) is tuple and len(pid) > 1 and pid[0] == "module":
        return pid[1]
    if type(pid) is not tuple or not 5 <= len(pid) <= 6 or pid[0] != "storage":
        _refuse_if_called(pid)
        raise ValueError(f"the persistent id, a {type(pid).__name__}, names no storage")
    dtype, key, numel = pid[1], pid[2], pid[4]
    if type(dtype) is Symbol:
        raise RefusedCheckpoint(
            f"a tensor lies in a storage of the kind {dtype!r:.200}, which does not hold plain "
            "numbers"
        )
    if type(dtype) is not torch.dtype or not _is_count(numel):
        _refuse_if_called(pid)
        raise ValueError("a persistent id names no storage with a kind and a length")
    view = pid[5] if len(pid) == 6 else None
    if view is not None:
        _, first, size = view
        if not _is_count(first) or not _is_count(size):
            raise ValueError("a view of a storage has no place")
        view = (first, size)
    return StorageRef(storage_key(key), dtype, numel, view)


def storage_key(key: Any) -> str:
    """The key of a storage, which is text or a number, as text."""
    if type(key) is str and len(key) <= LONGEST_KEY:
        return key
    if type(key) is int and key.bit_length() <= KEY_BITS:
        return str(key)
    raise ValueError(f"the key of a storage is a {type(key).__name__} or too long")


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number < 1 << 63


def _refuse_if_called(value: Any) -> None:
    for item in value if type(value) is tuple else (value,):
        if type(item) is Refused:
            raise RefusedCheckpoint(
                f"a tensor would be made from what {item.module:.100}.{item.name:.100} returns, "
                "and nothing that a checkpoint brings along is called"
            )


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorRef:
    if type(storage) is not StorageRef:
        _refuse_if_called(storage)
        raise TypeError(f"a tensor over a {type(storage).__name__}")
    if type(offset) is not int or type(size) is not tuple or type(stride) is not tuple:
        _refuse_if_called((offset, size, stride))
    if len(rest) > 2 and rest[2]:
        raise RefusedCheckpoint(
            "a tensor carries lazy marks, which change its values when it is read"
        )
    return TensorRef(storage, storage.dtype, offset, size, stride)


def _tensor_with_dtype(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> TensorRef:
    made = _tensor(storage, offset, size, stride, grad, hooks, *rest)
    if type(dtype) is not torch.dtype:
        raise TypeError("a tensor without a dtype")
    return made._replace(dtype=dtype)


def _first(made: Any, *rest: Any) -> Any:
    """A parameter is the tensor it wraps."""
    return made


def _of_type(function: Any, cls: Any, args: Any, state: Any) -> Any:
    if type(function) is Symbol and function.build in (_tensor, _tensor_with_dtype, _first):
        return function.build(*args)
    return Refused("torch._tensor", "_rebuild_from_type_v2", (function, cls, args, state))


def _items(items: Any) -> Any:
    """``items`` if they are all there already: a range could stand for any number of them."""
    if type(items) not in (list, tuple, dict, set, frozenset):
        raise TypeError(f"the items of a {type(items).__name__}")
    return items


def _size(items: Any) -> tuple[int, ...]:
    return tuple(_items(items))


def _device(kind: Any, index: Any = None) -> str:
    if type(kind) is not str or not (index is None or type(index) is int):
        raise TypeError("a device is not text and a number")
    return kind if index is None else f"{kind}:{index}"


def _mapping(items: Any = ()) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    if not items:
        return made
    pairs = items.items() if type(items) is dict else _items(items)
    put(made, [part for key, value in pairs for part in (key, value)])
    return made


def _default_mapping(factory: Any = None, items: Any = ()) -> dict[Any, Any]:
    return _mapping(items)


def _set(items: Any = ()) -> set[Any]:
    return set(checked(list(_items(items))))


def _frozen_set(items: Any = ()) -> frozenset[Any]:
    return frozenset(checked(list(_items(items))))


def _list(items: Any = (), limit: Any = None) -> list[Any]:
    return list(_items(items))


def _tuple(items: Any = ()) -> tuple[Any, ...]:
    return tuple(_items(items))


def _bytes_of(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "utf-8"):
        raise ValueError("bytes spelled in an encoding that is not known")
    return text.encode(encoding)


def _byte_array(data: Any = b"", encoding: str = "latin1", errors: Any = None) -> bytearray:
    if isinstance(data, str):
        return bytearray(_bytes_of(data, encoding))
    if not isinstance(data, bytes):
        raise TypeError("a bytearray of something else")
    return bytearray(data)


def _no_bytes() -> bytes:
    """How the old protocols spell the empty bytes; others go through ``_codecs.encode``."""
    return b""


def _complex(real: float, imaginary: float) -> complex:
    return complex(real, imaginary)


def _range(start: int, stop: int, step: int) -> range:
    return range(start, stop, step)


def _attribute(owner: Any, name: Any) -> Any:
    """A member of a class nobody knows: newer Pythons write members of enumerations this way."""
    if type(owner) is Symbol and type(name) is str:
        return Opaque(owner.module, owner.name, name)
    return Refused("builtins", "getattr", (owner, name))


def _reconstructed(cls: Any, kind: Any, state: Any) -> Any:
    """An object of protocol 0 or 1; one that extends a list or dict brings those items along."""
    made = new(cls, ())
    if isinstance(made, Opaque):
        if type(state) is dict:
            put(made, [part for pair in state.items() for part in pair])
        elif type(state) is list:
            extend(made, state)
        elif state is not None:
            made.args = (state,)
    return made


def _new_object(cls: Any, *args: Any) -> Any:
    return new(cls, args)


def _pure_path(*parts: str) -> pathlib.PurePosixPath:
    return pathlib.PurePosixPath(*parts)


def _pure_windows_path(*parts: str) -> pathlib.PureWindowsPath:
    return pathlib.PureWindowsPath(*parts)


def _date_and_time(*parts: Any) -> Any:
    return datetime.datetime(*parts)


def _time_zone(offset: Any, *name: Any) -> datetime.timezone:
    return datetime.timezone(offset, *name)


def _numpy_dtype(text: str, *rest: Any) -> Opaque:
    return Opaque("numpy", "dtype", None, (text,))


def _numpy_scalar(dtype: Any, data: Any = b"") -> Any:
    """A number that numpy wrote, as Python's own."""
    kind = dtype.args[0] if type(dtype) is Opaque and dtype.name == "dtype" else ""
    if type(data) is str:
        data = data.encode("latin1")
    if type(kind) is not str or type(data) is not bytes or not NUMPY_SCALAR.fullmatch(kind):
        return Opaque("numpy", "scalar", None, (dtype, data))
    import numpy

    (value,) = numpy.frombuffer(data, dtype=numpy.dtype(kind))
    return value.item()


def _opaque(module: str, name: str) -> Callable[..., Opaque]:
    """An inert object of the class, for classes whose calls do nothing but keep their arguments."""

    def make(*args: Any) -> Opaque:
        return Opaque(module, name, None, args)

    return make


def _member(module: str, name: str) -> Callable[..., Opaque]:
    def make(value: Any) -> Opaque:
        return Opaque(module, name, value)

    return make


def _calls() -> dict[tuple[str, str], Callable[..., Any]]:
    found: dict[tuple[str, str], Callable[..., Any]] = {
        ("torch._utils", "_rebuild_tensor"): _tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_tensor_v3"): _tensor_with_dtype,
        ("torch._utils", "_rebuild_parameter"): _first,
        ("torch._utils", "_rebuild_parameter_with_state"): _first,
        ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
        ("torch", "Size"): _size,
        ("torch", "device"): _device,
        ("torch.serialization", "_get_layout"): _first,
        ("collections", "OrderedDict"): _mapping,
        ("collections", "defaultdict"): _default_mapping,
        ("collections", "Counter"): _mapping,
        ("collections", "deque"): _list,
        ("builtins", "dict"): _mapping,
        ("builtins", "list"): _list,
        ("builtins", "tuple"): _tuple,
        ("builtins", "set"): _set,
        ("builtins", "frozenset"): _frozen_set,
        ("builtins", "bytearray"): _byte_array,
        ("builtins", "bytes"): _no_bytes,
        ("builtins", "complex"): _complex,
        ("builtins", "range"): _range,
        ("builtins", "xrange"): _range,
        ("builtins", "slice"): _opaque("builtins", "slice"),
        ("builtins", "getattr"): _attribute,
        ("_codecs", "encode"): _bytes_of,
        ("copyreg", "_reconstructor"): _reconstructed,
        ("copyreg", "__newobj__"): _new_object,
        ("decimal", "Decimal"): decimal.Decimal,
        ("datetime", "datetime"): _date_and_time,
        ("datetime", "date"): datetime.date,
        ("datetime", "time"): datetime.time,
        ("datetime", "timedelta"): datetime.timedelta,
        ("datetime", "timezone"): _time_zone,
        ("types", "SimpleNamespace"): _opaque("types", "SimpleNamespace"),
        ("functools", "partial"): _opaque("functools", "partial"),
        ("numpy", "dtype"): _numpy_dtype,
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        found[module, "scalar"] = _numpy_scalar
        found[module, "_reconstruct"] = _opaque("numpy", "ndarray")
    for module in ("pathlib", "pathlib._local"):
        for name in ("PosixPath", "PurePosixPath", "Path", "PurePath"):
            found[module, name] = _pure_path
        for name in ("WindowsPath", "PureWindowsPath"):
            found[module, name] = _pure_windows_path
    for module, name in ENUMERATIONS:
        found[module, name] = _member(module, name)
    return found


def _values() -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {
        ("torch", name): value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype | torch.layout | torch.memory_format)
    }
    for name, dtype in STORAGE_DTYPES.items():
        for module in ("torch", "torch.cuda", "torch.storage"):
            found[module, name] = dtype
    return found


_COPYING = frozenset(
    (
        *(_size, _mapping, _default_mapping, _set, _frozen_set, _list, _tuple),
        *(_bytes_of, _byte_array, _reconstructed, _numpy_scalar, decimal.Decimal),
        *(_pure_path, _pure_windows_path),
    )
)

SYMBOLS: dict[tuple[str, str], Any] = {
    **{key: Symbol(*key, build, copies=build in _COPYING) for key, build in _calls().items()},
    **_values(),
}
"""Extend it by passing ``{**SYMBOLS, ...}`` to :func:`bioinit.unpickle.load`."""
