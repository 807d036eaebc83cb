"""Any ``transformers`` architecture, started from its own checkpoint.

There is no file of ours per architecture: the config class is generated from transformers' own,
with its fields under its names, and the names of tensors come from transformers' own conversion
tables. Nested configs (``text_config``) are nested here too, so
``model.text_config.num_hidden_layers=2`` works.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import fiddle as fdl
from torch import nn

from bioinit.backends import transformers as backend
from bioinit.backends.protocol import Backend
from bioinit.backends.transformers import architectures, configs
from bioinit.config import TrainableModelConfig
from bioinit.contexts.protocol import Context
from bioinit.errors import ConfigError
from bioinit.families.protocol import (
    Family,
    ReadFields,
    SourceField,
    of_dialect,
    read_ours,
)
from bioinit.layout import Dims
from bioinit.mapping import Names
from bioinit.record import Marks, SavedField, Tracked, marked

Hf = dict[str, Any]


@dataclass(kw_only=True)
class AutoConfig(TrainableModelConfig):
    """What every generated config class has; ``model.architecture`` null is the saved one."""

    hf_class: ClassVar[Any] = None

    def hf_fields(self) -> Hf:
        """The fields of the transformers config."""
        chosen = architectures.head_fields(self.architecture or "", self.num_labels, self.labels)
        return {**_hf_fields(self), **chosen}

    def model_class(self) -> Any:
        """The transformers class.

        Raises:
            ConfigError: neither the config nor the checkpoint names one that there is.
        """
        named = self.architecture or next(iter(getattr(self, "architectures", None) or ()), None)
        model_type = self.hf_class.model_type
        if named is None:
            raise ConfigError(
                "the checkpoint's config.json names no architecture. Set model.architecture, one "
                f"of: {', '.join(_choices(model_type))}."
            )
        return architectures.model_class(model_type, named)

    def configure_model(self) -> nn.Module:
        """Construct the transformers model."""
        made = architectures.make_config(self.hf_class, self.hf_fields())
        return architectures.construct(self.model_class(), made)


@dataclass(kw_only=True)
class NestedConfig(Tracked):
    """A config inside a config, ``text_config`` for example."""

    hf_class: ClassVar[Any] = None


# A field of the name of a method would hide it as well.
_RESERVED = {f.name for f in dataclasses.fields(AutoConfig)} | {*dir(AutoConfig), "_tracking"}


def _ours(name: str) -> str:
    """Our name for a field of transformers; a few would hide one of every config."""
    return f"{name}_" if name in _RESERVED else name


def _hf_fields(config: Any) -> Hf:
    found: Hf = {}
    for field in dataclasses.fields(config):
        if field.name in _RESERVED:
            continue
        value = getattr(config, field.name)
        name = field.name.removesuffix("_") if field.name[:-1] in _RESERVED else field.name
        if isinstance(value, NestedConfig):
            value = {"model_type": value.hf_class.model_type, **_hf_fields(value)}
        found[name] = value
    return found


@functools.cache
def _generated(
    parent: type, cls: Any, undeclared: tuple[str, ...], nested: tuple[tuple[str, type], ...]
) -> type:
    """A config class of ours with the fields of a transformers class ``cls``."""
    inner = dict(nested)
    fields: list[tuple[str, Any, Any]] = []
    for declared in configs.declared(cls):
        if declared.name in inner:
            continue
        derive = functools.partial(_computed, declared.name) if declared.computed else None
        default = {"default": declared.default}
        if isinstance(declared.default, dict | list):
            default = {"default_factory": functools.partial(configs.plain, declared.default)}
        field = marked(Marks(derive=derive), **default)
        fields.append((_ours(declared.name), declared.annotation, field))
    fields += [(_ours(name), Any, dataclasses.field(default=None)) for name in undeclared]
    for name, kind in inner.items():
        fields.append((_ours(name), kind | None, dataclasses.field(default_factory=kind)))
    return dataclasses.make_dataclass(
        cls.__name__,
        fields,
        bases=(parent,),
        namespace={
            "__module__": __name__,
            "__doc__": f"The fields of transformers' {cls.__name__}.",
            "hf_class": cls,
        },
        kw_only=True,
    )


def _computed(name: str, config: Any) -> Any:
    """What transformers computes for a field that nobody set."""
    given = {k: v for k, v in _hf_fields(config).items() if k != name}
    made = architectures.make_config(type(config).hf_class, given)
    return configs.plain(getattr(made, name))


def _class_of(saved: configs.SavedConfig, parent: type) -> type:
    nested = tuple((name, _class_of(inner, NestedConfig)) for name, inner in saved.nested.items())
    return _generated(parent, saved.cls, tuple(sorted(saved.undeclared)), nested)


def _saved(context: Context | None) -> tuple[configs.SavedConfig, Context]:
    found = of_dialect(context, "hf")
    if found is None:
        raise ConfigError(
            "the family auto learns what the model is from a config.json beside the weights, and "
            "there is none. Set model.initial_ckpt_path to a Hugging Face checkpoint, or use a "
            "recipe of a named family."
        )
    if found.model is None:
        raise ConfigError(
            f"{found.where} names no model_type, so nobody can say what the model is. Use a recipe "
            "of a named family, or add the model_type to the file."
        )
    return configs.read(architectures.config_class(found.model), found.data), found


def config_for(context: Context | None) -> type[TrainableModelConfig]:
    """The generated config class for the checkpoint's kind of model."""
    cls: type[TrainableModelConfig] = _class_of(_saved(context)[0], AutoConfig)
    return cls


def _read_fields(context: Context, shapes: Mapping[str, Dims] | None = None) -> ReadFields:
    saved, found = _saved(context)
    cls = _class_of(saved, AutoConfig)
    if context.dialect == "bioinit" and context.model == f"{__name__}.{cls.__name__}":
        return read_ours(context, cls)
    return ReadFields(_saved_fields(saved, cls, found.where), tuple(_account(saved)))


def _saved_fields(saved: configs.SavedConfig, cls: type, where: str) -> dict[str, SavedField]:
    written = {new: old for old, now in saved.became.items() for new in now if now != (old,)}
    fields = {
        _ours(name): SavedField(value, name in saved.literal, f"{where}: {written.get(name, name)}")
        for name, value in saved.values.items()
    }
    for name, value in saved.undeclared.items():
        fields[_ours(name)] = SavedField(value, True, f"{where}: {name}")
    kinds = {f.name: f.default_factory for f in dataclasses.fields(cls)}
    for name, inner in saved.nested.items():
        kind: Any = kinds[_ours(name)]
        record = fdl.Config(kind)
        for key, field in _saved_fields(inner, kind, where).items():
            default = next(f for f in dataclasses.fields(kind) if f.name == key)
            if field.literal or field.value != default.default:
                setattr(record, key, field.value)
        is_literal = saved.became.get(name) is not None
        fields[_ours(name)] = SavedField(record, is_literal, f"{where}: {name}")
    return fields


def _account(saved: configs.SavedConfig, prefix: str = "") -> Iterable[SourceField]:
    for name, now in saved.became.items():
        if isinstance(now, str):
            yield SourceField(prefix + name, "ignored", now)
        elif name in saved.undeclared:
            note = f"{saved.cls.__name__} keeps it without declaring it"
            yield SourceField(prefix + name, "carried", note)
        else:
            yield SourceField(prefix + name, "mapped", ", ".join(prefix + _ours(n) for n in now))
    for name, inner in saved.nested.items():
        yield from _account(inner, f"{prefix}{name}.")


def _recognizes(context: Context) -> bool:
    found = of_dialect(context, "hf")
    return found is not None and found.model is not None


def _choices(model_type: str) -> tuple[str, ...]:
    return (*architectures.tasks(model_type), *architectures.names(model_type))


def _backend(config: TrainableModelConfig) -> Backend:
    if config.backend not in (None, "transformers"):
        raise ConfigError(
            f"model.backend={config.backend!r}, and the family auto builds the models of "
            "transformers. Use a recipe of a named family (`bioinit recipes` lists them), or leave "
            "model.backend out."
        )
    return backend.BACKEND


def _names(
    config: TrainableModelConfig,
    model: nn.Module,
    dialect: str,
    stored: Mapping[str, Dims],
    described: TrainableModelConfig | None = None,
    whole: Mapping[str, Dims] | None = None,
) -> Names:
    return backend.names(model, stored)


FAMILY = Family(
    config=None,
    recognizes=_recognizes,
    config_for=config_for,
    read_fields=_read_fields,
    build=lambda config: config.configure_model(),
    backend=_backend,
    names=_names,
    dialect_of=lambda stored: "hf",
)
