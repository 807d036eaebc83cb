"""The configs of a run: the root, and one small class for each who decides.

``model`` says what the model is and is saved with it, ``init`` where its values come from,
``placement`` where they land, ``output`` how they are written. People subclass
:class:`TrainableModelConfig` as an ordinary dataclass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator
from torch import nn

from bioinit.errors import ConfigError
from bioinit.record import (
    Origin,
    Tracked,
    any_config,
    bookkeeping,
    derived,
    one_of,
    own,
    renamed_from,
)

__all__ = [
    "InitPolicy",
    "Output",
    "Placement",
    "Run",
    "TrainableModelConfig",
    "bookkeeping",
    "derived",
    "one_of",
    "own",
    "renamed_from",
]


@dataclass(kw_only=True)
class TrainableModelConfig(Tracked):
    """What a model is, and which checkpoint it starts from.

    Subclass it with ``@dataclass(kw_only=True)`` and the fields of your model, and write
    :meth:`configure_model`; mark fields with :func:`own`, :func:`derived` or :func:`renamed_from`.
    Your config then merges with the one saved in a checkpoint, and is saved with the model.
    """

    initial_ckpt_path: str | None = own(None)
    initial_ckpt_skip_keys_with_these_prefixes: tuple[str, ...] = own(())
    override_parent_fields: tuple[str, ...] = own(())
    architecture: str | None = own(None)
    backend: Literal["transformers", "megatron"] | None = own(None)
    num_labels: int | None = derived(lambda c: len(c.labels) if c.labels else None, own=True)
    labels: tuple[str, ...] | None = own(None)

    def _settle(self) -> None:
        for name in ("initial_ckpt_skip_keys_with_these_prefixes", "override_parent_fields"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ConfigError(
                    f"{name}={value!r} is one text, and each of its letters would be an entry. "
                    f"Write a tuple: ({value!r},)."
                )
            if not isinstance(value, tuple):
                setattr(self, name, tuple(sorted(value) if isinstance(value, set) else value))
        super()._settle()
        if self.labels and self.num_labels != len(self.labels):
            raise ConfigError(
                f"num_labels={self.num_labels}, but there are {len(self.labels)} labels "
                f"({', '.join(self.labels)}). Drop one of the two."
            )

    def configure_model(self) -> nn.Module:
        """Construct the model. It is called while new parameters take no memory."""
        raise ConfigError(
            f"{type(self).__name__} does not say how its model is built. "
            "Write its method configure_model(), which returns the module."
        )


@dataclass(frozen=True, kw_only=True)
class InitPolicy:
    """Where values come from, and what is an error on the way."""

    on_conflict: Literal["error", "checkpoint", "recipe"] = "error"
    on_missing: Literal["error", "init"] = "error"
    on_unused: Literal["report", "error"] = "report"
    on_mismatch: Literal["error", "init", "resize"] = "error"
    new: tuple[str, ...] = ()
    seed: int = 0
    trainable: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    check_finite: bool = False
    layers: tuple[int, ...] | int | None = None
    convert: bool | str | None = None
    """``once`` (or true): a checkpoint in another dialect than the model's own is converted into
    the cache, and read from there; null or false: every checkpoint is read as it is."""

    def __post_init__(self) -> None:
        if self.convert not in (None, False, True, "once"):
            raise ConfigError(
                f"convert={self.convert!r} is not known: write once, or leave it out. The dialect "
                "is the one in which the model is built; `bioinit convert SRC DST --to DIALECT` "
                "writes any other to a folder of yours."
            )


_DEVICES = ("cpu", "cuda")

Strategy = Literal["single", "ddp", "fsdp2", "tp", "fsdp2+tp", "megatron"]
"""How processes share a model; the room ``parallelize`` says which axes each of them has."""


def _switch(value: Any) -> Any:
    """YAML reads a bare ``on`` or ``off`` as a boolean."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where and as what parameters live.

    ``dtype`` null keeps the stored one, ``device`` null is the CPU. ``strategy`` says how several
    processes share the model, ``mesh`` how many of them along each axis (or sizes alone, in the
    order of the strategy's axes); what is null follows from the other and from how many processes
    there are. ``parallel_load``: whether processes that hold the same parameters each read a part
    and exchange them; auto where they are on different hosts.
    """

    device: str | None = None
    dtype: torch.dtype | None = None
    mesh: tuple[int, ...] | dict[str, int] | None = None
    strategy: Strategy | None = None
    parallel_load: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = "auto"

    def __post_init__(self) -> None:
        try:
            kind = torch.device(self.device or "cpu").type
        except RuntimeError:
            kind = None
        if kind not in _DEVICES:
            raise ConfigError(
                f"device={self.device!r} names no device that a model is loaded to. Write cpu, "
                "cuda or cuda:0."
            )
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise ConfigError(
                f"dtype={self.dtype} cannot hold weights. Write bfloat16, float16 or float32."
            )


@dataclass(frozen=True, kw_only=True)
class Output:
    """How the result is written.

    ``format`` null is the one that goes with the dialect: safetensors for hf.
    """

    overwrite: bool = False
    dialect: str = "hf"
    format: str | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: what ``bioinit.compose`` describes and ``bioinit.initialize`` carries out.

    ``model`` is a config, or the plain fields of one while its class is not known yet (the family
    ``auto`` learns it from the checkpoint). ``origins`` says who wrote which dotted key.
    """

    family: str | None = None
    model: Any = any_config()  # noqa: RUF009
    init: InitPolicy = field(default_factory=InitPolicy)
    placement: Placement = field(default_factory=Placement)
    output: Output = field(default_factory=Output)
    output_dir: str | None = None
    origins: Mapping[str, Origin] = bookkeeping(dict)

    def __post_init__(self) -> None:
        if not isinstance(self.model, TrainableModelConfig | Mapping | None):
            raise ConfigError(
                f"model is {self.model!r}, not a model's config. Give the fields of one, or an "
                "instance of a subclass of TrainableModelConfig."
            )
