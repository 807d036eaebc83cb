"""Values that are written as names: dtypes, devices, functions.

A name is looked up in a closed table, or among the objects that a field declares. Nothing is
imported because a file names it. torch is imported when it is first needed: composing a recipe
needs none.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from bioinit.errors import ConfigError
from bioinit.keys import suggestion
from bioinit.record.fields import label

_SHORT_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "16": "float16",
    "fp32": "float32",
    "float": "float32",
    "32": "float32",
    "fp64": "float64",
    "double": "float64",
}
_ACTIVATIONS = (
    "celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu log_softmax logsigmoid "
    "mish relu relu6 rrelu selu sigmoid silu softmax softmin softplus softshrink softsign tanh "
    "tanhshrink"
).split()
_OTHER_NAMES = {"swish": "silu"}


@functools.cache
def _dtypes() -> Mapping[str, Any]:
    import torch

    found = {k: v for k, v in vars(torch).items() if isinstance(v, torch.dtype)}
    return {name: dtype for name, dtype in found.items() if str(dtype) == f"torch.{name}"}


def dtype(value: Any) -> Any:
    """A torch dtype from ``bfloat16``, ``bf16``, ``torch.bfloat16`` or the dtype itself.

    Raises:
        ValueError: there is no such dtype.
    """
    known = _dtypes()
    name = str(value).removeprefix("torch.")
    name = _SHORT_DTYPES.get(name, name)
    if isinstance(value, bool) or name not in known:
        raise ValueError(f"it names no dtype. {suggestion(name, known)}".rstrip(" ."))
    return known[name]


def device(value: Any) -> Any:
    """A torch device from ``cpu``, ``cuda:0`` or the device itself.

    Raises:
        ValueError: torch knows no such device.
    """
    import torch

    try:
        return torch.device(value)
    except (RuntimeError, TypeError):
        raise ValueError("it names no device; write cpu, cuda or cuda:0") from None


@functools.cache
def functions() -> Mapping[str, Any]:
    """The activations of torch, by the names that people write for them."""
    import torch

    homes = (("torch.nn.functional", torch.nn.functional), ("torch", torch))
    return {
        f"{home}.{name}": getattr(module, name)
        for home, module in homes
        for name in _ACTIVATIONS
        if hasattr(module, name)
    }


def name_of(value: Any, choices: Iterable[Any] = ()) -> str:
    """The name under which :func:`resolve` finds a function or class again.

    Raises:
        ConfigError: it would not be found.
    """
    for name, known in functions().items():
        if known is value:
            return name
    if any(choice is value for choice in choices):
        return label(value)
    raise ConfigError(
        f"{label(value)} cannot be written down: only functions that can be found again without an "
        "import are. Use one of torch.nn.functional, or name it in the field: "
        f"one_of({getattr(value, '__name__', 'f')}, ...)."
    )


def resolve(value: Any, choices: Iterable[Any] = ()) -> Any:
    """A function or class: the object itself, or what its name means.

    Raises:
        ValueError: it is neither callable nor a name of the table.
    """
    if callable(value):
        return value
    known = {label(c): c for c in choices} | {getattr(c, "__name__", label(c)): c for c in choices}
    short = _OTHER_NAMES.get(value, value)
    for name in (value, f"torch.nn.functional.{short}", f"torch.{short}"):
        if isinstance(name, str) and name in known:
            return known[name]
        if isinstance(name, str) and name in functions():
            return functions()[name]
    hint = suggestion(str(value), {*_ACTIVATIONS, *known})
    raise ValueError(f"it names no function that this field knows. {hint}".rstrip(" ."))
