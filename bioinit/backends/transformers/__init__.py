"""Models of the ``transformers`` library, built on meta and initialized by their own code.

Constructing under the meta device is what ``from_pretrained`` does. New parameters and the
buffers that are not stored (rotary frequencies, position ids) are computed by
``initialize_weights``, which skips a tensor that carries the flag ``_is_hf_initialized``. The
flag is set on loaded tensors for the duration and taken off again; the flag on modules stays, as
after any construction of a transformers model, so that a later ``init_weights()`` does not start
over.

Importing this package imports no transformers; using it does.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bioinit.backends.protocol import Backend, Make, Watch, built_class
from bioinit.errors import ConfigError
from bioinit.layout import Dims
from bioinit.mapping import Names

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_FLAG = "_is_hf_initialized"


def imported(module: str = "transformers") -> ModuleType:
    """The ``transformers`` package or a module of it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "transformers":
            raise
        raise ConfigError(
            "this model is built by transformers, which is not installed. "
            "Install it with: pip install 'bioinit[hf]'."
        ) from None


def build(make: Make) -> nn.Module:
    """The model that ``make`` constructs, with everything on meta and tied weights tied."""
    creation = imported("transformers.initialization").meta_device_safe_creation_ops
    with torch.device("meta"), creation():
        return make()


def initialize(
    model: nn.Module, make: Make, loaded: Collection[str], watch: Watch
) -> Mapping[str, torch.Tensor]:
    """Run ``initialize_weights`` on everything that is not in ``loaded``."""
    whole: Any = model
    known = set(loaded)
    new = {id(tensor) for key, tensor in _tensors(model) if key not in known}
    flagged = [tensor for _, tensor in _tensors(model) if id(tensor) not in new]
    paths = {id(module): path for path, module in model.named_modules()}
    for module in model.modules():
        vars(module).pop(_FLAG, None)
    try:
        for tensor in flagged:
            setattr(tensor, _FLAG, True)
        with _announced(model, lambda module: watch.entering(paths.get(id(module), ""))):
            whole.initialize_weights()
    finally:
        for _, tensor in _tensors(model):
            vars(tensor).pop(_FLAG, None)
    return {}


def describe_init(model: nn.Module, key: str) -> str | None:
    """For example ``BertPreTrainedModel._init_weights on Linear``."""
    path = key.rpartition(".")[0]
    pretrained = imported().PreTrainedModel
    owner = model.get_submodule(path)
    while True:
        module = model.get_submodule(path)
        if isinstance(module, pretrained):
            rule = type(module)._init_weights.__qualname__
            return f"{rule} on {built_class(owner).__name__}"
        if not path:
            return None
        path = path.rpartition(".")[0]


def float32_keys(model: nn.Module, dtype: torch.dtype) -> frozenset[str]:
    """What ``_keep_in_fp32_modules`` of the architecture protects from ``dtype``."""
    whole: Any = model
    plan = whole._get_dtype_plan(dtype)
    if not plan:
        return frozenset()
    pattern = re.compile("|".join(name.replace("*", ".*") for name in plan))
    return frozenset(key for key, _ in _tensors(model) if pattern.search(key))


def names(model: nn.Module, stored: Mapping[str, Dims]) -> Names:
    """Both tables for ``model`` and stored names, by transformers' own conversion tables."""
    imported()
    from bioinit.backends.transformers import conversions

    return conversions.names(model, stored)


def remember(model: nn.Module, stored: Collection[str]) -> None:
    """Hand the transforms that ``stored`` names went through back to the model, as loading does."""
    imported()
    from bioinit.backends.transformers import conversions

    whole: Any = model
    whole._weight_conversions = conversions.used(model, stored)


def save(model: nn.Module, folder: Path, max_bytes: int) -> None:
    """What ``save_pretrained`` writes: weights as they were named when read, and configs."""
    logging = imported("transformers.utils.logging")
    whole: Any = model
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        whole.save_pretrained(folder, max_shard_size=max_bytes)
    finally:
        if bars:
            logging.enable_progress_bar()


def saved_names(model: nn.Module, shapes: Mapping[str, Dims]) -> Mapping[str, str] | None:
    """What ``save_pretrained`` calls the tensors that it writes; None if it converts any."""
    imported()
    from bioinit.backends.transformers import conversions

    return conversions.saved_names(model, shapes)


def save_beside(model: nn.Module, folder: Path) -> None:
    """The configs that ``save_pretrained`` writes beside the weights."""
    whole: Any = model
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), None)
    if dtype is not None:
        whole.config.dtype = str(dtype).removeprefix("torch.")
    whole.config.architectures = [built_class(model).__name__]
    whole.config.save_pretrained(folder)
    if whole.can_generate():
        whole.generation_config.save_pretrained(folder)


def divide(model: nn.Module, mesh: DeviceMesh, plan: Mapping[str, str]) -> None:
    """Divide tensors among the ranks of ``mesh``, by ``plan`` or that of the architecture."""
    imported()
    from bioinit.backends.transformers import division

    division.divide(model, mesh, plan)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


@contextmanager
def _announced(model: nn.Module, entering: Callable[[nn.Module], None]) -> Iterator[None]:
    """Call ``entering`` with each module just before transformers initializes it."""
    pretrained = imported().PreTrainedModel
    wrapped: list[Any] = [m for m in model.modules() if isinstance(m, pretrained)]
    for module in wrapped:
        original = module._initialize_weights

        def announcing(
            child: nn.Module, *rest: Any, original: Callable[..., None] = original
        ) -> None:
            entering(child)
            original(child, *rest)

        vars(module)["_initialize_weights"] = announcing
    try:
        yield
    finally:
        for module in wrapped:
            vars(module).pop("_initialize_weights", None)


BACKEND = Backend(
    build=build,
    initialize=initialize,
    describe_init=describe_init,
    float32_keys=float32_keys,
    remember=remember,
    save=save,
    saved_names=saved_names,
    save_beside=save_beside,
    divide=divide,
)
