"""What backends share that construct a module more than once: a hand on every registration.

A constructor registers its parameters in an order that depends on its config alone. So a parameter
can be replaced at the moment it is registered, and known again, by its place in that order, when
the constructor runs a second time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import UninitializedParameter
from torch.utils.weak import WeakTensorKeyDictionary

from bioinit.backends.protocol import Make
from bioinit.errors import ConfigError

Register = Callable[[nn.Parameter], nn.Parameter]


def constructed(make: Make) -> nn.Module:
    """The module that ``make`` gives.

    Raises:
        ConfigError: the constructor needs the values of a parameter, or does not give a module.
    """
    try:
        model = make()
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
        raise ConfigError(
            f"the constructor uses the values of a parameter ({error}), and bioinit constructs a "
            "module before its parameters have any. Compute what you need from the config, or in "
            "a buffer."
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"configure_model() gave a {type(model).__name__}, not an nn.Module.")
    return model


def changing(how: str) -> ConfigError:
    """The error for a constructor that does something else the second time."""
    return ConfigError(
        f"the constructor of this module is not repeatable: {how}. "
        "Make configure_model() depend on the config alone."
    )


def to_meta(parameter: nn.Parameter) -> nn.Parameter:
    """The same parameter without memory, attributes included."""
    if parameter.is_meta:
        return parameter
    moved = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    vars(moved).update(vars(parameter))
    return moved


def registration_order(make: Make) -> list[set[str]]:
    """The keys of every parameter in the order of registration; none if it was dropped again."""
    registered: list[nn.Parameter] = []

    def note(parameter: nn.Parameter) -> nn.Parameter:
        registered.append(to_meta(parameter))
        return registered[-1]

    with registering(note):
        model = constructed(make)
    aliases: dict[int, set[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), set()).add(key)
    return [aliases.get(id(parameter), set()) for parameter in registered]


@contextmanager
def registering(replace: Register) -> Iterator[None]:
    """Replace every parameter that this thread registers; one object stays one object."""
    thread = threading.get_ident()
    replaced, done = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()

    def hook(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        lazy = isinstance(parameter, UninitializedParameter)
        if threading.get_ident() != thread or parameter is None or lazy or parameter in done:
            return None
        if parameter not in replaced:
            replaced[parameter] = replace(parameter)
            done[replaced[parameter]] = True
        return replaced[parameter]

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()
