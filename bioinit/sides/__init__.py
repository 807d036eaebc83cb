"""The two sides of a plan: what the live model offers, and how stored names are to be read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from bioinit.backends.protocol import Backend
from bioinit.config import TrainableModelConfig
from bioinit.contexts import Checkpoint
from bioinit.families import dialect_in
from bioinit.families.protocol import Family
from bioinit.keys import template
from bioinit.layout import Dims
from bioinit.mapping import Mapping as NameMapping
from bioinit.mapping import Names
from bioinit.plan import Model
from bioinit.prefixes import AS_STORED, Spelling, solve
from bioinit.sides.given import Given, names_given
from bioinit.targets import Target
from bioinit.transforms.claims import catches, expanded

NamesOf = Callable[[nn.Module, Mapping[str, Dims]], Names]


@runtime_checkable
class _HasEmbeddings(Protocol):
    """What architectures with a vocabulary offer; the convention of ``transformers``."""

    def get_input_embeddings(self) -> nn.Module | None: ...

    def get_output_embeddings(self) -> nn.Module | None: ...


def model_side(
    module: nn.Module,
    targets: Mapping[str, Target],
    backend: Backend,
    dtype: torch.dtype | None,
) -> Model:
    """``module``, described by ``targets``, as planning sees it."""
    float32 = backend.float32_keys(module, dtype) if dtype is not None else frozenset()

    def slot(key: str) -> str:
        return targets[key].slot if key in targets else key

    def describe_init(key: str) -> str:
        return backend.describe_init(module, slot(key)) or "nothing"

    def pinned(key: str) -> torch.dtype | None:
        return torch.float32 if slot(key) in float32 else None

    def computed(key: str) -> bool:
        # Running statistics are learned; a fresh start for them is no substitute.
        owner = module.get_submodule(slot(key).rpartition(".")[0])
        given = backend.describe_init(module, slot(key))
        return not isinstance(owner, _NormBase) and given is not None

    return Model(targets, describe_init, pinned, computed, _vocab_keys(module))


def _vocab_keys(module: nn.Module) -> Collection[str]:
    """Keys with a row per token: both embeddings, and a bias that stands beside the output's."""
    if not isinstance(module, _HasEmbeddings):
        return ()
    try:
        found = (module.get_input_embeddings(), module.get_output_embeddings())
    except NotImplementedError:  # how transformers says that a model has no vocabulary
        return ()
    embeddings = {id(p) for m in found if m is not None for p in m.parameters(recurse=False)}
    output = found[1]
    if output is not None:
        [path] = [name for name, inner in module.named_modules() if inner is output] or [""]
        beside = module.get_submodule(path.rpartition(".")[0]).parameters(recurse=False)
        rows = {p.shape[0] for p in output.parameters(recurse=False) if p.dim() == 2}
        embeddings |= {id(p) for p in beside if p.dim() == 1 and p.shape[0] in rows}
    return {k for k, p in module.named_parameters(remove_duplicate=False) if id(p) in embeddings}


def names_of_family(
    family: Family,
    config: TrainableModelConfig,
    described: TrainableModelConfig | None,
    module: nn.Module,
    targets: Mapping[str, Target],
    checkpoint: Checkpoint | None,
) -> tuple[Names, Spelling]:
    """The tables of a family for this checkpoint, and how its names are spelled."""
    if checkpoint is None:
        return family.names(config, module, "hf", {}), AS_STORED
    dialect = dialect_in(family, checkpoint.context, checkpoint.tensors)
    return _names(
        module,
        targets,
        checkpoint,
        lambda live, shapes: family.names(config, live, dialect, shapes, described),
    )


def names_of_module(
    module: nn.Module,
    targets: Mapping[str, Target],
    checkpoint: Checkpoint,
    own_names: NamesOf | None,
    mapping: Given | None,
) -> tuple[Names, Spelling]:
    """The tables for a module that somebody has already, or the ones this person gave."""
    if mapping is not None:
        shapes = {n: t.shape for n, t in checkpoint.tensors.items() if t.kind == "weight"}
        return names_given(mapping, shapes, targets), AS_STORED
    identity = Names(NameMapping.identity(), NameMapping.identity())
    return _names(module, targets, checkpoint, own_names or (lambda live, shapes: identity))


def _names(
    module: nn.Module, targets: Mapping[str, Target], checkpoint: Checkpoint, names_of: NamesOf
) -> tuple[Names, Spelling]:
    shapes = {n: t.shape for n, t in checkpoint.tensors.items() if t.kind == "weight"}
    keys = [key for key, target in targets.items() if target.persistent]
    names, spelling = solved(lambda asked: names_of(module, asked), keys, shapes)
    owners = {key: targets[key].tied_to for key in keys}
    return expanded(names, shapes, owners, spelling.spell), spelling


def solved(
    names_of: Callable[[Mapping[str, Dims]], Names], keys: Sequence[str], shapes: Mapping[str, Dims]
) -> tuple[Names, Spelling]:
    """Solve wrapper prefixes first, then ask for the tables of the names as they are spelled.

    Args:
        names_of: both tables, for stored names and shapes without what wrappers added.
        keys: what is wanted, by the names of the memory's table.
        shapes: the stored tensors.

    Raises:
        AmbiguousFormat: the stored names fit in more than one way.
    """
    as_stored = names_of(shapes)
    # What stands in front of names in another world is no front of the model's own.
    fronts: Sequence[str] = [rule.pattern_text for rule in as_stored.disk.rules if rule.parts]
    fronts = keys if _Wanted(as_stored, keys).is_spelled_alike else fronts

    def known(spelled: Mapping[str, str]) -> Collection[str]:
        is_stored = all(name == stored for name, stored in spelled.items())
        asked = {name: shapes[stored] for name, stored in spelled.items()}
        wanted = _Wanted(as_stored if is_stored else names_of(asked), keys)
        return {name for name in spelled if wanted(name)}

    spelling = solve(tuple(shapes), known, fronts)
    if spelling == AS_STORED:
        return as_stored, spelling
    stored_as = {spelling.spell(name): name for name in shapes}
    names = names_of({name: shapes[stored] for name, stored in stored_as.items()})
    return names.with_sources(stored_as), spelling


class _Wanted:
    """Whether the model wants a tensor of a name. Judged by templates, so it is cheap to ask.

    A name is wanted if it is a key of the model, if the disk dialect leads it to a canonical tensor
    to which some key of the model leads as well, or if a conversion for the model reads it.
    """

    def __init__(self, names: Names, keys: Collection[str]) -> None:
        self._names = names
        self._live = keys

    @cached_property
    def _keys(self) -> dict[str, str]:
        return {template(key): key for key in self._live}

    @cached_property
    def _wanted(self) -> set[str]:
        memory = self._names.memory
        return {found for key in self._keys.values() for found in _canonical(memory, key)}

    @cached_property
    def _converted(self) -> set[str]:
        return {template(name) for c in self._names.conversions for name in c.sources}

    def __call__(self, name: str) -> bool:
        kind = template(name)
        return (
            kind in self._keys
            or kind in self._converted
            or catches(self._names.disk, name)
            or any(found in self._wanted for found in _canonical(self._names.disk, name))
            or _is_dropped(self._names.disk, name)
        )

    @property
    def is_spelled_alike(self) -> bool:
        """Whether the stored names' table knows some key of the model."""
        return any(self._names.disk.rule_for(key) is not None for key in self._live)


def _is_dropped(mapping: NameMapping, name: str) -> bool:
    rule = mapping.rule_for(name)
    return rule is not None and not rule.parts


def _canonical(mapping: NameMapping, name: str) -> Iterator[str]:
    """Templates of the canonical tensors that ``name`` leads to."""
    rule = mapping.rule_for(name)
    captures = None if rule is None else rule.pattern.match(name)
    if rule is not None and captures is not None:
        for part in rule.parts:
            yield template(part.key(captures, (0,) * len(part.each)))
