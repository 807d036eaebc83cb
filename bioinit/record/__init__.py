"""The record of a config: what was set and by whom. The live config is built from it.

A record is a ``fiddle.Config`` that holds the fields somebody set and nothing else. What people
write enters through :func:`make_record`; :func:`build` makes the live config;
:func:`save_context` writes the record beside the weights and :func:`load_record` brings an equal
one back.
"""

from __future__ import annotations

from bioinit.record.context import load_record, model_node, read_context, save_context, shown
from bioinit.record.door import (
    coerce,
    fit,
    judge,
    make_record,
    record_of,
    with_records,
)
from bioinit.record.fields import (
    Marks,
    Origin,
    SavedField,
    Spec,
    any_config,
    bookkeeping,
    derived,
    is_config,
    label,
    marked,
    one_of,
    own,
    renamed_from,
    same,
    set_in,
    specs,
)
from bioinit.record.live import (
    Tracked,
    build,
    changed_behind,
    get_hparam,
    get_hparams,
    get_non_default_hparams,
    set_hparam,
)
from bioinit.record.notation import Unreadable, plain, read_fields

__all__ = [
    "Marks",
    "Origin",
    "SavedField",
    "Spec",
    "Tracked",
    "Unreadable",
    "any_config",
    "bookkeeping",
    "build",
    "changed_behind",
    "coerce",
    "derived",
    "fit",
    "get_hparam",
    "get_hparams",
    "get_non_default_hparams",
    "is_config",
    "judge",
    "label",
    "load_record",
    "make_record",
    "marked",
    "model_node",
    "one_of",
    "own",
    "plain",
    "read_context",
    "read_fields",
    "record_of",
    "renamed_from",
    "same",
    "save_context",
    "set_hparam",
    "set_in",
    "shown",
    "specs",
    "with_records",
]
