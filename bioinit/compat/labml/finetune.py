"""Which parameters of the layers are trained, and keeping those alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from bioinit.compat.labml._merge import MissingKey, WrongShape
from bioinit.compat.labml.model import TransformerLayer
from bioinit.errors import ConfigError
from bioinit.keys import suggestion
from bioinit.load.parameters import overwrite

__all__ = ["FineTuneBiases", "FineTuner", "UnknownKey"]


class UnknownKey(ConfigError, AssertionError):
    """A state is given that holds what is not trained here."""


class FineTuner(ABC):
    """Some parameters of ``layers``, by the number of their layer and their name.

    Stands in for ``labml_nn.neox.utils.finetune.FineTuner``. Names, values and errors are its own;
    a state is looked at before anything of it is put in place, where the original had written half
    of it when it failed.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.layers = list(layers)

    def get_trainable_params(self) -> dict[str, nn.Parameter]:
        """All parameters that are trained, as ``layer_00.attention.output.bias``."""
        return {
            name: parameter
            for number, layer in enumerate(self.layers)
            for name, parameter in self.get_layer_trainable_params(
                layer, prefix=f"layer_{number:02d}"
            ).items()
        }

    @abstractmethod
    def get_layer_trainable_params(self, layer: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
        """Those of one layer, each name with ``prefix`` and a dot before it."""

    def set_trainable_params(self) -> None:
        """Train these parameters of the layers, and no others."""
        for layer in self.layers:
            layer.requires_grad_(False)
        for parameter in self.get_trainable_params().values():
            parameter.requires_grad_(True)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The parameters that are trained, on the CPU; on the CPU they share their memory."""
        return {name: p.detach().cpu() for name, p in self.get_trainable_params().items()}

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Put what :meth:`state_dict` gave back in place.

        Raises:
            MissingKey: it lacks a parameter; also a ``KeyError``.
            UnknownKey: it holds others; also an ``AssertionError``.
            WrongShape: one is of another size.
        """
        parameters = self.get_trainable_params()
        for name, parameter in parameters.items():
            if name not in state_dict:
                raise MissingKey(
                    f"the state holds no {name!r}, which is trained here. Load it with the layers "
                    f"that it was made of. {suggestion(name, state_dict)}".rstrip()
                )
            if parameter.shape != state_dict[name].shape:
                raise WrongShape(
                    f"{name!r} has {list(state_dict[name].shape)} in the state and "
                    f"{list(parameter.shape)} here. Make the layers with the sizes it was made of."
                )
        for name in state_dict:
            if name not in parameters:
                raise UnknownKey(
                    f"the state holds {name!r}, which is not trained here. Load it with the "
                    f"fine-tuner that it was made by. {suggestion(name, parameters)}".rstrip()
                )
        for name, parameter in parameters.items():
            overwrite(parameter, state_dict[name])


class FineTuneBiases(FineTuner):
    """Three biases of each transformer layer.

    Stands in for ``labml_nn.neox.utils.finetune.FineTuneBiases``. The bias of the last linear layer
    is left out, since it is added to that of the attention's.
    """

    def get_layer_trainable_params(self, layer: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
        """Biases of ``layer`` if it is a transformer layer, else none."""
        if not isinstance(layer, TransformerLayer):
            return {}
        names = ("attention.output.bias", "attention.qkv_lin.bias", "ffn.dense_h_h4.bias")
        return {f"{prefix}.{name}": layer.get_parameter(name) for name in names}
