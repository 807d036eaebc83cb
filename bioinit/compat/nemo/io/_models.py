"""A model being converted: made ready, written and read again, without a trainer."""

from __future__ import annotations

import atexit
import gc
import importlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bioinit import families
from bioinit.backends import module as plain_module
from bioinit.compat._capture import IOMixin, IOProtocol
from bioinit.compat._saved import load_context
from bioinit.compat.nemo._found import UNFINISHED
from bioinit.compat.nemo.ckpt_utils import CONTEXT_PATH, WEIGHTS_PATH
from bioinit.compat.nemo.io.pl import NoContext, TrainerContext
from bioinit.errors import ConfigError
from bioinit.initialize import load_weights
from bioinit.storage import atomic_folder, disk_error

_MAX_SHARD_BYTES = 5 * 10**9
_SHOWN = 5


class Conversion(IOMixin):
    """What ``nemo_setup`` returns where NeMo returned a trainer: it holds the model for the save.

    Attributes:
        lightning_module: the model.
    """

    def __init__(self) -> None:
        self.lightning_module: Any = None


def prepare(model: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Conversion:
    """See ``ModelConnector.nemo_setup``."""
    if args or kwargs:
        said = ", ".join([*map(repr, args), *kwargs])
        raise ConfigError(
            f"nemo_setup was given {said:.200} for MegatronStrategy, and there is no strategy "
            "here. Leave it out; how a model is divided is said to bioinit when it is loaded."
        )
    held = _conversion(trainer)
    if not model.state_dict():
        _configure(model)
    held.lightning_module = model
    return held


def save(output: Path, trainer: Any, dump_io: bool) -> None:
    """See ``ModelConnector.nemo_save``."""
    model = _conversion(trainer).lightning_module
    if model is None:
        raise ConfigError("nemo_save was given a trainer without a model: call nemo_setup(model).")
    tensors = _Tensors(model)
    empty = [key for key, tensor in tensors.state_dict().items() if tensor.is_meta]
    if empty:
        raise ConfigError(
            f"cannot save to {output}: {len(empty)} parameters have no values, they are on meta: "
            f"{', '.join(empty[:_SHOWN])}. Map the source's weights to them first."
        )
    if dump_io and not isinstance(model, IOProtocol):
        raise NoContext(
            f"LightningModule must extend IOMixin, and {type(model).__name__} does not: derive it, "
            "or save with dump_io=False."
        )
    marker = output.with_name(output.name + UNFINISHED)
    try:
        output.mkdir(parents=True, exist_ok=True)
        marker.touch()
        with atomic_folder(output / WEIGHTS_PATH, overwrite=True) as at:
            plain_module.save(tensors, at, _MAX_SHARD_BYTES)
    except OSError as error:
        raise disk_error(error, f"write {output}") from error
    if dump_io:
        context: Any = TrainerContext(model=model, trainer=trainer)
        context.io_dump(output / CONTEXT_PATH, yaml_attrs=["model"])
    marker.unlink()


def load(path: Path, trainer: Any, cpu: bool) -> tuple[Any, Conversion]:
    """See ``ModelConnector.nemo_load``."""
    held = _conversion(trainer)
    model = load_context(path, subpath="model")
    if getattr(model, "model_transform", None) is not None:
        raise ConfigError(
            f"{path} holds a model with an adapter (model_transform), which nemo_load does not "
            "load here. Merge the adapter into its model with NeMo, and load that."
        )
    config = getattr(model, "config", None)
    for name, value in (("fp8", None), ("fp8_param", False), ("perform_initialization", False)):
        if hasattr(config, name):
            setattr(config, name, value)
    if not model.state_dict():
        _configure(model)
    load_weights(_loaded_into(model), path)
    if not cpu:
        if not torch.cuda.is_available():
            raise ConfigError(f"cannot load {path} with cpu=False: there is no GPU. Use cpu=True.")
        model.cuda()
    held.lightning_module = model
    return model, held


def teardown(trainer: Any, model: Any = None) -> None:
    """Stands in for ``nemo.lightning.teardown``: forgets the model of a conversion.

    There is no trainer and no process group to take down; a model that the caller still holds stays
    as it is.
    """
    if isinstance(trainer, Conversion):
        trainer.lightning_module = None
    gc.collect()


def give_tokenizer(connector: Any, model: Any) -> None:
    """See ``ModelConnector.on_import_ckpt``."""
    if not hasattr(connector, "tokenizer"):
        return
    tokenizer = connector.tokenizer
    model.tokenizer = tokenizer
    if isinstance(model, IOProtocol) and isinstance(tokenizer, IOProtocol):
        model.__io__.tokenizer = tokenizer.__io__


def tokenizer_assets(name: str, save_path: str | Path | None) -> str:
    """See ``ModelConnector.save_hf_tokenizer_assets``."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(
            f"cannot save the tokenizer {name}: transformers is not installed. Install bioinit[hf]."
        ) from error
    if save_path is None:
        folder = tempfile.mkdtemp(prefix="nemo_tokenizer-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    else:
        folder = str(save_path)
    transformers.AutoTokenizer.from_pretrained(name).save_pretrained(folder)
    return folder


class _Tensors(nn.Module):
    """A model as its tensors; a state dict of Megatron's holds other things too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._whole = (model,)  # not a submodule: its names are to stay as they are

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        whole: dict[str, Any] = self._whole[0].state_dict(*args, **kwargs)
        return {key: value for key, value in whole.items() if isinstance(value, torch.Tensor)}


def _conversion(trainer: Any) -> Conversion:
    if trainer is None:
        return Conversion()
    if isinstance(trainer, Conversion):
        return trainer
    raise ConfigError(
        f"a {type(trainer).__name__} was given as trainer, and no trainer is driven here. Leave it "
        "out, or pass what nemo_setup returned."
    )


def _loaded_into(model: nn.Module) -> nn.Module:
    """The part of ``model`` that has the weights: Megatron's model, if it only wraps one.

    What Megatron wrote has names of its own, which only its models know.
    """
    children = list(model.children())
    is_wrapper = len(children) == 1 and families.is_megatron(children[0])
    return children[0] if is_wrapper else model


def _configure(model: Any) -> None:
    """Let ``model`` make its parameters, if it has a way to."""
    configure = getattr(model, "configure_model", None)
    if configure is not None:
        configure()
    if not isinstance(model, nn.Module) or not model.state_dict():
        raise ConfigError(
            f"{type(model).__name__} has no parameters, and its configure_model made none. Make "
            "them in its constructor, or in configure_model()."
        )
