"""Small models and the configs of both worlds, for the story that ``test_story`` tells.

An autoencoder of pictures is pretrained, trained on, given a head that names what is on them, and
loses its decoder again.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bioinit import TrainableModelConfig
from bioinit.compat import bionemo
from bioinit.compat.nemo import io

PIXELS, CLASSES, STEPS, BATCH = 36, 4, 60, 64


class Encoder(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.squeeze = nn.Linear(PIXELS, config.hidden_size)
        self.latent = nn.Linear(config.hidden_size, 3)

    def forward(self, pictures: torch.Tensor) -> Any:
        return self.latent(torch.relu(self.squeeze(pictures)))


class Autoencoder(Encoder):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.widen = nn.Linear(3, config.hidden_size)
        self.paint = nn.Linear(config.hidden_size, PIXELS)

    def painted(self, latent: torch.Tensor) -> torch.Tensor:
        return self.paint(torch.relu(self.widen(latent)))

    def forward(self, pictures: torch.Tensor) -> Any:
        return self.painted(super().forward(pictures))


class Both(Autoencoder):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(3, CLASSES)

    def forward(self, pictures: torch.Tensor) -> Any:
        latent = Encoder.forward(self, pictures)
        return self.painted(latent), self.classifier(latent)


class Classifier(Encoder):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(3, CLASSES)

    def forward(self, pictures: torch.Tensor) -> Any:
        return self.classifier(super().forward(pictures))


class PaintingLoss:
    def __call__(self, output: Any, pictures: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.mse_loss(output, pictures)


class NamingLoss:
    def __call__(self, output: Any, pictures: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(output, labels)


class BothLosses:
    def __call__(self, output: Any, pictures: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        painted, named = output
        return functional.mse_loss(painted, pictures) + functional.cross_entropy(named, labels)


def train(model: nn.Module, loss: Any, steps: int = STEPS) -> list[float]:
    """The loss of every step; the same pictures each time."""
    draw = torch.Generator().manual_seed(5)
    ideals = torch.rand(CLASSES, PIXELS, generator=draw)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        labels = torch.randint(CLASSES, (BATCH,), generator=draw)
        pictures = ideals[labels] + 0.05 * torch.randn(BATCH, PIXELS, generator=draw)
        value = loss(model(pictures), pictures, labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


# --- BioNeMo's way ---


def configs(parent: Any) -> SimpleNamespace:
    """The three configs over ``parent``, a ``MegatronBioNeMoTrainableModelConfig``."""

    @dataclass
    class Shared(parent):  # type: ignore[misc, valid-type]
        loss_cls: type = PaintingLoss
        hidden_size: int = 16
        num_attention_heads: int = 1
        num_layers: int = 1
        override_parent_fields: list[str] = field(
            default_factory=lambda: [*bionemo.OVERRIDE_BIONEMO_CONFIG_DEFAULTS, "loss_cls"]
        )

        def configure_model(self) -> nn.Module:
            if self.initial_ckpt_path:
                self.load_settings_from_checkpoint(self.initial_ckpt_path)
            model: nn.Module = self.model_cls(self)
            if self.initial_ckpt_path:
                self.update_model_from_checkpoint(model, self.initial_ckpt_path)
            return model

        def get_loss_reduction_class(self) -> type:
            return self.loss_cls

    @dataclass
    class Pretrain(Shared, bionemo.IOMixinWithGettersSetters):
        model_cls: type = Autoencoder
        loss_cls: type = PaintingLoss

    @dataclass
    class AddHead(Shared, bionemo.IOMixinWithGettersSetters):
        model_cls: type = Both
        loss_cls: type = BothLosses

    @dataclass
    class DropHead(Shared, bionemo.IOMixinWithGettersSetters):
        model_cls: type = Classifier
        loss_cls: type = NamingLoss

    return SimpleNamespace(Pretrain=Pretrain, AddHead=AddHead, DropHead=DropHead)


class Lightning(io.IOMixin):
    """What a trainer is given: it owns the config, and makes the model when it is told to."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def configure_model(self) -> None:
        self.module = self.config.configure_model()


class Trainer(io.IOMixin):
    def __init__(self, max_steps: int = STEPS) -> None:
        self.max_steps = max_steps


# --- bioinit's way ---


@dataclass(kw_only=True)
class OurShared(TrainableModelConfig):
    hidden_size: int = 16
    hidden_dropout: float = 0.1


@dataclass(kw_only=True)
class OurPretrain(OurShared):
    def configure_model(self) -> nn.Module:
        return Autoencoder(self)


@dataclass(kw_only=True)
class OurAddHead(OurShared):
    def configure_model(self) -> nn.Module:
        return Both(self)


@dataclass(kw_only=True)
class OurDropHead(OurShared):
    def configure_model(self) -> nn.Module:
        return Classifier(self)
