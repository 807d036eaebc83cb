"""How a run's model will be written: as its backend does it, or by the tables of its family."""

from __future__ import annotations

from bioinit.config import Run, TrainableModelConfig
from bioinit.contexts import Checkpoint
from bioinit.families.protocol import Family, ReadFields
from bioinit.save.across import Across
from bioinit.save.beside import carried_fields
from bioinit.save.plain import BY_BACKENDS, Plain
from bioinit.save.worlds import format_for, written_dialect

_OF_ANY_NAMES = (BY_BACKENDS[1], "torch_dist")
"""Formats that take a model's tensors by whatever names it has."""


def across_for(
    run: Run,
    family: Family,
    config: TrainableModelConfig,
    checkpoint: Checkpoint | None,
    saved: ReadFields | None,
) -> Across | Plain:
    """How the model of ``config`` is written.

    Raises:
        ConfigError: ``output.dialect`` or ``output.format`` is none that the family is written in.
    """
    to = run.output.dialect
    chosen = format_for(to, run.output.format)
    context = None if checkpoint is None else checkpoint.context
    files = {} if context is None else context.carried
    homes = () if checkpoint is None else checkpoint.homes
    backend = family.backend(config)
    if not family.dialects and to == BY_BACKENDS[0] and chosen in _OF_ANY_NAMES:
        return Plain(backend, chosen, files, homes)
    name = run.family or type(config).__name__
    written_dialect(family, name, to)
    fields = carried_fields(context, saved)
    tables = Across(family, name, config, to, chosen, fields=fields, files=files, homes=homes)
    if (to, chosen) == BY_BACKENDS and backend.saved_names is not None:
        return Plain(backend, chosen, files, homes, tables)
    return tables
