"""What a model's config promises: stands in for ``bionemo.core.model.config``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

ModelOutput = TypeVar(
    "ModelOutput", Tensor, list[Tensor], tuple[Tensor], dict[str, Tensor], covariant=True
)
"""What a forward pass gives: a tensor, several, or several with names."""

LossType = TypeVar("LossType")
"""Any class of loss."""


class Model(Protocol[ModelOutput]):
    """Something with a forward pass. Stands in for ``bionemo.core.model.config.Model``."""

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        """Compute the output for one batch."""
        ...


ModelType = TypeVar("ModelType", bound=Model[Any])
"""Any class of model."""


class BionemoModelConfig(Generic[ModelType], ABC):
    """A config that can make its model.

    Stands in for ``bionemo.core.model.config.BionemoModelConfig``.
    """

    @abstractmethod
    def configure_model(self, *args: Any, **kwargs: Any) -> Any:
        """Make the model."""
        raise NotImplementedError


class BionemoTrainableModelConfig(Generic[ModelType, LossType], BionemoModelConfig[ModelType]):
    """A config that also knows how its model is trained.

    Stands in for ``bionemo.core.model.config.BionemoTrainableModelConfig``.
    """

    @abstractmethod
    def get_loss_reduction_class(self) -> type[LossType]:
        """Give the class of the loss."""
        raise NotImplementedError
