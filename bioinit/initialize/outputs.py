"""Whether a run's model is written by its backend, or by the tables of its family."""

from __future__ import annotations

from bioinit.config import Run, TrainableModelConfig
from bioinit.contexts import Checkpoint
from bioinit.families.protocol import Family, ReadFields
from bioinit.save.across import Across
from bioinit.save.beside import carried_fields
from bioinit.save.plain import Plain
from bioinit.save.worlds import format_for, written_dialect

_OF_BACKENDS = ("hf", "safetensors")
"""What backends write themselves. Megatron's writes nothing."""


def across_for(
    run: Run,
    family: Family,
    config: TrainableModelConfig,
    checkpoint: Checkpoint | None,
    saved: ReadFields | None,
    is_divided: bool,
) -> Across | Plain | None:
    """How the model of ``config`` is written where its backend does not do it; None if it does.

    Backends write whole models: one that is divided among ranks is written by the tables of its
    family, or, without such tables, in the names that the backend would give.

    Raises:
        ConfigError: ``output.dialect`` or ``output.format`` is none that the family is written in.
    """
    to = run.output.dialect
    chosen = format_for(to, run.output.format)
    is_megatron = config.backend == "megatron" and bool(family.dialects)
    if (to, chosen) == _OF_BACKENDS and not is_megatron and not is_divided:
        return None
    context = None if checkpoint is None else checkpoint.context
    files = {} if context is None else context.carried
    homes = () if checkpoint is None else checkpoint.homes
    if is_divided and to == "hf" and not family.dialects:
        return Plain(family.backend(config), chosen, files, homes)
    name = run.family or type(config).__name__
    written_dialect(family, name, to)
    return Across(
        family,
        name,
        config,
        to,
        chosen,
        fields=carried_fields(context, saved),
        files=files,
        homes=homes,
    )
