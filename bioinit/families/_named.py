"""What named families have in common: a config class, dialects, and who builds the model.

A named family declares its dialects; this page makes of them the answers that the seam asks for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import nn

from bioinit import backends
from bioinit.backends import transformers
from bioinit.backends.protocol import Backend
from bioinit.backends.transformers import named
from bioinit.backends.transformers.named import Line, Translation
from bioinit.config import TrainableModelConfig
from bioinit.contexts.protocol import Context
from bioinit.errors import ConfigError
from bioinit.families.protocol import (
    Canonical,
    Dialect,
    Family,
    ReadFields,
    SourceField,
    Written,
    of_dialect,
    read_ours,
)
from bioinit.layout import Dims
from bioinit.mapping import Mapping as Table
from bioinit.mapping import Names
from bioinit.record import SavedField, specs
from bioinit.rules import Rule

Config = TrainableModelConfig
Builder = Callable[[Any], nn.Module]

MEGATRON = "megatron"
"""The name of the backend, and of the dialect whose table its live models have."""


def named_family(
    config: type[Config],
    translation: Translation,
    dialects: Mapping[str, Dialect],
    tensors: Callable[[Any], Mapping[str, Canonical]],
    megatron: Builder | None = None,
    absent: Mapping[str, str] | None = None,
    tensor_parallel: Mapping[str, str] | None = None,
) -> Family:
    """The family of ``config``.

    Args:
        config: the config class.
        translation: its fields in ``config.json``.
        dialects: by name, as contexts call them: ``hf``, ``nemo2``, ``nemo1``, ``neox``, ...
        tensors: the canonical space for a config.
        megatron: constructs the megatron-core model; None if there is none.
        absent: why there is no dialect of a name that other families have.
        tensor_parallel: styles by module, where transformers has no plan for the architecture.

    Raises:
        ConfigError: the translation names a field that the class does not have.
    """
    unknown = [ours for ours in translation.names.values() if ours not in specs(config)]
    if unknown:
        raise ConfigError(
            f"the translation for {translation.model_type!r} names {', '.join(unknown)}, and "
            f"{config.__name__} has no such field. Correct the names, or declare the field."
        )

    def is_ours(context: Context) -> bool:
        return context.dialect == "bioinit" and str(context.model).startswith(
            f"{config.__module__}."
        )

    def described(context: Context) -> Context | None:
        found = (of_dialect(context, name) for name in dialects)
        return next((c for c in found if c is not None and dialects[c.dialect].recognizes(c)), None)

    def read_fields(context: Context, shapes: Mapping[str, Dims] | None = None) -> ReadFields:
        if is_ours(context):
            return read_ours(context, config)
        saved = described(context)
        if saved is None:
            raise ConfigError(
                f"{context.where} describes {context.model!r}, which {config.__name__} does not "
                "stand for. `bioinit inspect` says which family it is of."
            )
        read = dialects[saved.dialect].read(saved, shapes or {})
        carried = context.sidecar.get("bioinit", {})
        return _recalled(read, carried, config, dialects[saved.dialect], context.where)

    def is_megatron(asked: Config) -> bool:
        if asked.backend == MEGATRON and megatron is None:
            why = (absent or {}).get(MEGATRON, "megatron-core has no model of this family")
            raise ConfigError(
                f"model.backend={MEGATRON!r}, and {why}. Leave model.backend out: transformers "
                "builds it."
            )
        return asked.backend == MEGATRON

    def build(asked: Config) -> nn.Module:
        if is_megatron(asked) and megatron is not None:
            return megatron(asked)
        return translation.construct(asked)

    def backend(asked: Config) -> Backend:
        if is_megatron(asked):
            return backends.load(MEGATRON)

        def remember(model: nn.Module, stored: Collection[str]) -> None:
            # transformers spells what it saves as it was read; other worlds' names mean nothing
            # to it, and its models in memory have names of their own.
            if not dialects["hf"].spells(stored):
                table = Table(dialects["hf"].rules(asked, {}, named.body_of(model)))
                canonical = {key: each.shape for key, each in tensors(asked).items()}
                stored = table.spelled_out(canonical)
            transformers.remember(model, stored)

        return dataclasses.replace(transformers.BACKEND, remember=remember)

    def names(
        asked: Config,
        model: nn.Module,
        dialect: str,
        stored: Mapping[str, Dims],
        described: Config | None = None,
        whole: Mapping[str, Dims] | None = None,
    ) -> Names:
        live = _whole_shapes(model, backend(asked)) if whole is None else whole
        if is_megatron(asked):
            spoken, body = MEGATRON, translation.body(asked)
        else:
            spoken, body = "hf", named.body_of(model)
        memory = dialects[spoken].rules(asked, live, body)
        told = dialects.get(dialect, dialects["hf"])
        return Names(Table(told.rules(described or asked, stored, body)), Table(memory))

    def dialect_of(stored: Iterable[str]) -> str | None:
        keys = tuple(stored)
        return next((name for name, dialect in dialects.items() if dialect.spells(keys)), None)

    return Family(
        config=config,
        recognizes=lambda context: is_ours(context) or described(context) is not None,
        config_for=lambda context: config,
        read_fields=read_fields,
        build=build,
        backend=backend,
        names=names,
        dialect_of=dialect_of,
        dialects=dialects,
        tensors=tensors,
        absent=absent or {},
        body=translation.body,
        tensor_parallel=tensor_parallel or {},
    )


def _recalled(
    read: ReadFields,
    carried: Mapping[str, Any],
    config: type[Config],
    dialect: Dialect,
    where: str,
) -> ReadFields:
    """``read``, with fields of ours that an earlier conversion noted.

    What the dialect says itself counts, and its silence too: somebody may have edited it since.
    """
    known = specs(config)
    fields = dict(read.fields)
    for name, value in carried.items():
        if name not in known:
            continue
        held = fields.get(name)
        if name in dialect.says:
            says = dialect.blurs.get(name)
            is_meant = says is not None and held is not None and says(value) == says(held.value)
        else:
            is_meant = held is None or not held.literal
        if is_meant:
            fields[name] = SavedField(value, True, f"what was carried along beside {where}: {name}")
    return read._replace(fields=fields)


def hf(
    translation: Translation,
    lines: Callable[[Any], Collection[Line]],
    marks: tuple[str, ...],
    heads: Callable[[Any], named.Heads],
    recognizes: Callable[[Context], bool] | None = None,
    more: Callable[[Any], Collection[Rule]] = lambda config: (),
) -> Dialect:
    """The dialect of ``transformers``.

    Args:
        translation: the fields of ``config.json``.
        lines: the tensors of a config.
        marks: ends of names by which stored tensors are known to be of this family in this dialect.
        heads: how attention is factored.
        recognizes: whether a ``config.json`` is of this family; by its model type if None.
        more: rules that are no lines, with names in full.
    """

    def rules(config: Config, shapes: Mapping[str, Dims], body: str) -> list[Rule]:
        tied = getattr(config, "share_embeddings_and_output_weights", False)
        # A tied head that is stored all the same is the embedding once more.
        found = [
            line._replace(canonical="embedding.word_embeddings.weight")
            if tied and line.canonical == "output_layer.weight"
            else line
            for line in lines(config)
        ]
        found.sort(key=lambda line: not line.is_body)
        return [*named.rules(found, body, shapes, heads(config)), *more(config)]

    def read(context: Context, shapes: Mapping[str, Dims] | None = None) -> ReadFields:
        fields, fates = translation.read(context.data, context.where)
        return ReadFields(fields, tuple(SourceField(*fate) for fate in fates))

    def write(config: Config, carried: Mapping[str, Any], tokenizer: Collection[str]) -> Written:
        # As fields of ours: transformers' class knows what goes with them.
        known = {k: v for k, v in carried.items() if k not in translation.names}
        given: Any = config
        whole = dataclasses.replace(given, extra={**known, **given.extra})
        document = json.loads(translation.written(whole))
        account = tuple(SourceField(name, "carried", "the source's sidecar") for name in known)
        text = json.dumps(document, indent=2, sort_keys=True) + "\n"
        return Written({"config.json": text.encode()}, account=account)

    return Dialect(
        rules=rules,
        spells=lambda stored: any(key.endswith(marks) for key in stored),
        recognizes=recognizes or (lambda context: context.model == translation.model_type),
        read=read,
        write=write,
        fields=translation.names,
        says=frozenset(translation.names.values()),
    )


def _whole_shapes(model: nn.Module, backend: Backend) -> dict[str, Dims]:
    """What ``model`` holds, by the names and shapes of the whole one, of which it may be a part."""
    parts = backend.located(model)
    return {
        parts[key].key if key in parts else key: (
            parts[key].shape if key in parts else tuple(tensor.shape)
        )
        for key, tensor in _tensors(model)
    }


def _tensors(model: nn.Module) -> Iterable[tuple[str, Any]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
