"""A person's own ``nn.Module``: constructed without memory, initialized by its own constructor.

There is no convention for how a module of one's own gives its parameters their first values: some
fill them in ``reset_parameters``, some call ``self.apply(...)`` at the end of ``__init__``, some
write ``nn.Parameter(torch.ones(3))``. What they share is the constructor. So the module is
constructed twice: first with every parameter moved to meta as it is registered (buffers stay
real), and, only when some parameter has to be initialized, once more with just those parameters
real.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from bioinit.backends._registration import (
    changing,
    constructed,
    registering,
    registration_order,
    to_meta,
)
from bioinit.backends.protocol import Backend, Make, Watch, built_class


def build(make: Make) -> nn.Module:
    """The module with its parameters on meta, as they were registered; buffers are real.

    Raises:
        ConfigError: the constructor needs the values of a parameter, or does not give a module.
    """
    with registering(to_meta):
        return constructed(make)


def initialize(
    model: nn.Module, make: Make, loaded: Collection[str], watch: Watch
) -> Mapping[str, torch.Tensor]:
    """Values for the parameters that are not in ``loaded``, as the constructor makes them."""
    new = {key for key, _ in model.named_parameters(remove_duplicate=False)} - set(loaded)
    if not new:
        return {}
    order = registration_order(make)
    wanted = [min(aliases & new, default="") for aliases in order]
    made: dict[str, nn.Parameter] = {}
    position = iter(range(len(order)))

    def choose(parameter: nn.Parameter) -> nn.Parameter:
        index = next(position, None)
        if index is None:
            raise changing("it registers more parameters the second time")
        key = wanted[index]
        if key:
            made[key] = parameter
            watch.stands_for(parameter, key)
        upcoming = next(filter(None, wanted[index + 1 :]), "")
        watch.entering(upcoming.rpartition(".")[0])
        return parameter if key else to_meta(parameter)

    watch.entering(next(filter(None, wanted), "").rpartition(".")[0])
    with registering(choose), _nan_where_nothing_is_written():
        again = constructed(make)
    shapes = {key: p.shape for key, p in model.named_parameters(remove_duplicate=False)}
    if shapes != {key: p.shape for key, p in again.named_parameters(remove_duplicate=False)}:
        raise changing("it gives other parameters the second time")
    # What the constructor leaves unwritten is not a value: load reports it by its name.
    return {key: p.detach() for key, p in made.items() if not bool(p.detach().isnan().any())}


def describe_init(model: nn.Module, key: str) -> str | None:
    """For example ``the constructor of MyModel (Linear)``."""
    owner = model.get_submodule(key.rpartition(".")[0])
    return f"the constructor of {built_class(model).__name__} ({built_class(owner).__name__})"


def float32_keys(model: nn.Module, dtype: torch.dtype) -> frozenset[str]:
    """A person's own module asks for nothing of the kind."""
    return frozenset()


def remember(model: nn.Module, stored: Collection[str]) -> None:
    """Names are saved as the module has them."""


def save(model: nn.Module, folder: Path, max_bytes: int) -> None:
    """The state dict as safetensors, in files of at most ``max_bytes``; a tied tensor once."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[key] = tensor.detach().contiguous()
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = max_bytes
    for key, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = max_bytes
        shards[-1][key] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@contextmanager
def _nan_where_nothing_is_written() -> Iterator[None]:
    """Memory that ``torch.empty`` gives is NaN instead of whatever lay there."""
    filling: Any = torch.utils.deterministic
    was = torch.get_deterministic_debug_mode(), filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(was[0])
        filling.fill_uninitialized_memory = was[1]


BACKEND = Backend(
    build=build,
    initialize=initialize,
    describe_init=describe_init,
    float32_keys=float32_keys,
    remember=remember,
    save=save,
)
