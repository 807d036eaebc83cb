"""Stands in for ``nemo.lightning.io.pl``, as far as it is data: the root of a saved context."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from bioinit.compat._capture import IOMixin
from bioinit.compat._later import later
from bioinit.compat._saved import register, write_as
from bioinit.errors import ConfigError

if TYPE_CHECKING:
    from bioinit.compat.nemo.ckpt_utils import ckpt_to_weights_subdir, is_distributed_ckpt

__all__ = ["NoContext", "TrainerContext", "ckpt_to_weights_subdir", "is_distributed_ckpt"]
ModelT = TypeVar("ModelT")


class NoContext(ConfigError, ValueError):
    """A trainer, or its model, does not know how it was made."""


@dataclass
class TrainerContext(IOMixin, Generic[ModelT]):
    """Stands in for ``nemo.lightning.io.pl.TrainerContext``: a model, its trainer, and more.

    It holds whatever is given to it; Lightning is not needed.

    Attributes:
        model: the model, an object that is tracked.
        trainer: the trainer, an object that is tracked.
        extra: more objects by name; ``datamodule`` is the data's.
    """

    model: ModelT
    trainer: Any
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_trainer(cls, trainer: Any) -> Self:
        """The context of a trainer that has a ``lightning_module``.

        Raises:
            NoContext: the trainer or its model is not tracked; it is a ``ValueError`` too.
        """
        if not hasattr(trainer, "__io__"):
            raise NoContext(
                f"Trainer must be an instance of IOProtocol, but {type(trainer).__name__} is not "
                f"tracked: call track_io({type(trainer).__name__}) before it is made."
            )
        if not hasattr(trainer.lightning_module, "__io__"):
            kind = type(trainer.lightning_module).__name__
            raise NoContext(f"LightningModule must extend IOMixin, and {kind} does not: derive it.")
        return cls(
            trainer=trainer, model=trainer.lightning_module, extra=cls.construct_extra(trainer)
        )

    @classmethod
    def construct_extra(cls, trainer: Any) -> dict[str, Any]:
        """What ``extra`` holds for a trainer: its datamodule, where that is tracked."""
        data: Any = getattr(trainer, "datamodule", None)
        return {"datamodule": data.__io__} if hasattr(data, "__io__") else {}


register(TrainerContext, "nemo.lightning.io.api.TrainerContext", "nemo.lightning.io.TrainerContext")
write_as(TrainerContext, "nemo.lightning.io.pl", "TrainerContext")


__getattr__, __dir__ = later(
    __name__, {"bioinit.compat.nemo.ckpt_utils": "ckpt_to_weights_subdir is_distributed_ckpt"}
)
