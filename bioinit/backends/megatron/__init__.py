"""Models of megatron-core: constructed on meta, initialized by constructing them over live memory.

Megatron's modules write their first values in the constructor and nowhere else. So the constructor
runs a second time, and every parameter that it registers is given the memory of the live one in its
place: what it writes arrives, and what ``load`` protects stays. Megatron draws a weight in a tensor
of its own first, of which each process keeps a part; it is drawn under the name that the parameter
registered last has in the whole model, so the parts fit together into what one process draws, and
it gets no memory where that parameter stays as it is.

Importing this package imports no megatron-core; using it does. Families call :func:`gpt` and
:func:`bert`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bioinit.backends._registration import (
    changing,
    constructed,
    registering,
    registration_order,
    to_meta,
)
from bioinit.backends.megatron.located import global_names, located, stages
from bioinit.backends.megatron.models import (
    activation,
    bert,
    gpt,
    rows_of_one,
    transformer_config,
)
from bioinit.backends.megatron.world import imported, require_world
from bioinit.backends.protocol import Backend, Make, Watch
from bioinit.errors import ConfigError

__all__ = [
    "BACKEND",
    "activation",
    "bert",
    "gpt",
    "imported",
    "located",
    "require_world",
    "transformer_config",
]


def build(make: Make) -> nn.Module:
    """The model that ``make`` constructs, with every parameter and buffer on meta.

    Raises:
        ConfigError: megatron-core is missing, or process groups divide what cannot be divided so.
    """
    imported()
    require_world()
    with torch.device("meta"), registering(to_meta):
        return constructed(make)


def initialize(
    model: nn.Module, make: Make, loaded: Collection[str], watch: Watch
) -> Mapping[str, torch.Tensor]:
    """Construct the model over its own memory; the buffers that are not in ``loaded`` are given."""
    require_world()
    known = set(loaded)
    live = dict(model.named_parameters(remove_duplicate=False))
    buffers = {key for key, _ in model.named_buffers(remove_duplicate=False)} - known
    if not buffers and set(live) <= known:
        return {}
    named = global_names(model)
    with torch.device("meta"):
        order = registration_order(make)
    rows = next(filter(None, (rows_of_one(stage) for _, stage in stages(model))), None)
    sparing = _Sparing()
    position = iter(range(len(order)))

    def replace(parameter: nn.Parameter) -> nn.Parameter:
        index = next(position, None)
        if index is None:
            raise changing("it registers more parameters the second time")
        key = min(order[index], default="")
        sparing.stays = order[index] <= known
        whole = named.get(key, key)
        sparing.rows = rows if whole in _BY_TOKEN else None
        watch.entering(whole)
        if not key:
            return to_meta(parameter)
        if live[key].shape != parameter.shape:
            raise changing("it gives other parameters the second time")
        # Not the live object: Megatron marks what it constructs, and refuses to do so twice.
        return nn.Parameter(live[key].detach(), requires_grad=parameter.requires_grad)

    with registering(replace), sparing:
        again = constructed(make)
    return {key: tensor for key, tensor in again.named_buffers() if key in buffers}


_BY_TOKEN = ("embedding.word_embeddings.weight", "output_layer.weight")
"""What has rows that only make the parts of all processes equal."""


class _Sparing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives no memory to what a constructor makes for a parameter whose value stays."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stays = True
        """Whether that is so of the parameter that was registered last."""
        self.rows: int | None = None
        """How many rows of it one process would draw; the others only make parts equal."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.stays and func is torch.ops.aten.empty.memory_format:
            kwargs = {**kwargs, "device": torch.device("meta")}
        if self.rows is not None and torch.Tag.nondeterministic_seeded in func.tags:
            drawn = args[0]
            if drawn.dim() == 2 and drawn.shape[0] > self.rows:
                for part in (drawn[: self.rows], drawn[self.rows :]):
                    func(part, *args[1:], **kwargs)
                return drawn
        return func(*args, **kwargs)


def describe_init(model: nn.Module, key: str) -> str | None:
    """For example ``the constructor of GPTModel (ColumnParallelLinear)``."""
    owner = model.get_submodule(key.rpartition(".")[0])
    stage = next(iter(stages(model)))[1]
    return f"the constructor of {type(stage).__name__} ({type(owner).__name__})"


def float32_keys(model: nn.Module, dtype: torch.dtype) -> frozenset[str]:
    """Megatron has its routers' weights in the dtype of the rest, and says so for none other."""
    return frozenset()


def remember(model: nn.Module, stored: Collection[str]) -> None:
    """Names are those of the dialect that is written."""


def save(model: nn.Module, folder: Path, max_bytes: int) -> None:
    """Megatron's models have no files of their own: the tables of their family write them.

    Raises:
        ConfigError: always; this is asked only where there are no such tables.
    """
    raise ConfigError(
        f"{type(model).__name__} is built by megatron-core, and its family has no tables to write "
        "it by. Use a recipe of a named family, or save its state_dict() yourself."
    )


BACKEND = Backend(
    build=build,
    initialize=initialize,
    describe_init=describe_init,
    float32_keys=float32_keys,
    remember=remember,
    save=save,
    located=located,
    saved_names=None,
    meet=require_world,
)
