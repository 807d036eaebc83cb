"""A run file of BioNeMo, checked: its sections, and what can be concluded from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bioinit import families
from bioinit.contexts.protocol import Context
from bioinit.errors import BioinitError, ConfigError
from bioinit.families.protocol import ReadFields
from bioinit.keys import suggestion
from bioinit.migrate import bionemo
from bioinit.migrate.bionemo import DATA, KINDS, LISTED, MODEL, NEMO1, PARALLEL, PATH, SKIPPED
from bioinit.migrate.page import listed, shown
from bioinit.sides.sane import require_sane

HEADS = {"regression_head": "regression", "classification_head": "token_classification"}
"""What BioNeMo calls the head of a task, and the task."""

_SEQUENCE = ("task_type", "mlp_ft_dropout", "mlp_hidden_size", "mlp_target_size")


class RunFile:
    """The file: its sections, and what can be concluded from them."""

    def __init__(self, where: str, tree: Mapping[Any, Any]) -> None:
        _require_known(tree, where)
        self.where = where
        self.sections = {n: _section(tree, n, where) for n in (MODEL, *bionemo.SECTIONS)}
        self.others = {key: value for key, value in tree.items() if key not in self.sections}
        sections = self.sections
        self.model = sections[MODEL]
        self.checkpoint = self._checkpoint()
        self.skipped = self._texts(SKIPPED)
        self.listed = self._texts(LISTED)
        self.found, self.saved = self._look()

    def _checkpoint(self) -> str | None:
        first, second = (self.text_at(MODEL, key) for key in (PATH, NEMO1))
        if first and second:
            raise ConfigError(
                f"{self.where}: {MODEL}.{PATH} is {shown(first)!r} and {NEMO1} is "
                f"{shown(second)!r}, and a model starts from one of them. Leave one out."
            )
        found = first or second
        if found is not None and (found == "???" or "\0" in found):
            raise ConfigError(
                f"{self.where}: {MODEL}.{PATH if first else NEMO1} is {shown(found)!r}, which is "
                "no path. Fill it in."
            )
        place = os.path.abspath(os.path.expanduser(found)) if found else None
        return place if place and os.path.exists(place) else found

    def text_at(self, section: str, key: str) -> str | None:
        """A field that is a text or null."""
        value = self.sections[section].get(key)
        if not isinstance(value, str | None):
            raise ConfigError(
                f"{self.where}: {section}.{key} is {shown(value)!r}, not a text. Quote it."
            )
        return value

    def _texts(self, key: str) -> tuple[str, ...]:
        value = self.model.get(key)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(
                f"{self.where}: {MODEL}.{key} is {shown(value)!r}, not a list of names. Write "
                f"[{value if isinstance(value, str) else 'regression_head'}]."
            )
        if "" in value:
            raise ConfigError(
                f"{self.where}: {MODEL}.{key} has an empty prefix, with which BioNeMo loads "
                "nothing. Take it out, or start without a checkpoint."
            )
        return tuple(dict.fromkeys(value))

    def _look(self) -> tuple[str | None, Mapping[str, Any]]:
        """The family of the checkpoint, and the fields of its config, where it lies here."""
        if self.checkpoint is None or not os.path.exists(self.checkpoint):
            return None, {}
        try:
            with families.open_checkpoint(Path(self.checkpoint)) as opened:
                found = families.find(opened.context, opened.tensors)
                if opened.context is None or found not in KINDS:
                    return found, {}
                for said in (opened.context, *opened.context.beside):
                    require_sane(said.data, said.where, len(opened.tensors))
                shapes = {key: tensor.shape for key, tensor in opened.tensors.items()}
                read = families.load(str(found)).read_fields(opened.context, shapes)
        except BioinitError:
            return None, {}  # `bioinit plan` says what is wrong with it
        return found, {name: field.value for name, field in read.fields.items()}

    def family(self) -> tuple[str, str]:
        """The family of the model, and how it is known."""
        if self.found is not None:
            return self.found, "as the checkpoint's own config says"
        for name, kind in KINDS.items():
            for section, fields in kind.marks.items():
                has = [field for field in fields if field in self.sections[section]]
                if has:
                    return name, f"since {section}.{has[0]} is a field of {kind.word}'s runs"
        option = str(self.model.get("biobert_spec_option"))
        if option.startswith("esm2"):
            return "esm2", f"since biobert_spec_option is {option}"
        return "biobert", "which BioNeMo's own base class is; nothing in the file says more"

    def task(self) -> str:
        """The recipe's task, by the head that the run leaves out."""
        head = next((name for name in HEADS if name in self.skipped), None)
        if head == "classification_head" and any(key in self.model for key in _SEQUENCE):
            return "sequence_classification"
        return "masked_lm" if head is None else HEADS[head]

    def described(self, family: str) -> ReadFields:
        """The model's fields in ours, by the very table that reads BioNeMo's checkpoints."""
        kind = KINDS[family]
        data = {str(key): value for key, value in self.model.items() if key != LISTED}
        if self.checkpoint is None:
            data = {**bionemo.EXPOSED, **data}
        length = self.sections[DATA].get("seq_length")
        if length is not None:
            data["seq_length"] = length
        function = data.get("activation_func")
        if isinstance(function, str) and "." not in function:
            data["activation_func"] = f"torch.nn.functional.{function.lower()}"
        tree = {"model": {"config": data, "tokenizer": {"_target_": kind.tokenizer}}}
        raw = {"canonical": kind.config}
        context = Context("nemo2", f"{self.where}: {MODEL}", data, kind.config, tree, raw)
        return families.load(family).dialects["nemo2"].read(context, {})

    def size(self, key: str) -> int:
        """A size of ``parallel_config``."""
        value = self.sections[PARALLEL].get(key, 1)
        if type(value) is not int or value < 1:
            raise ConfigError(
                f"{self.where}: {PARALLEL}.{key} is {shown(value)!r}, not a number from 1 on."
            )
        return value


def _require_known(tree: Mapping[Any, Any], where: str) -> None:
    """Refuse a file without a model, and keys that are misspelt: BioNeMo drops them silently."""
    known = {MODEL: bionemo.FIELDS} | {
        name: frozenset(fields.split()) for name, (_, fields) in bionemo.SECTIONS.items()
    }
    _require_spelt(tree, known, where, "")
    if MODEL not in tree:
        raise ConfigError(
            f"{where} has no {MODEL}, so it is no run of BioNeMo. It has {listed(map(str, tree))}. "
            "Give what bionemo-esm2-train --config takes."
        )
    for name, fields in known.items():
        _require_spelt(_section(tree, name, where), fields, where, f"{name}.")


def _require_spelt(
    section: Mapping[Any, Any], known: Mapping[str, Any] | frozenset[str], where: str, at: str
) -> None:
    for key in section:
        hint = "" if key in known else suggestion(str(key), known)
        if hint:
            raise ConfigError(
                f"{where}: {at}{shown(key)} is no field of BioNeMo's, which would drop it without "
                f"a word. {hint} Correct it, or take it out."
            )


def _section(tree: Mapping[Any, Any], name: str, where: str) -> Mapping[str, Any]:
    found = tree.get(name)
    if found is None and name != MODEL:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(
            f"{where}: {name} is {shown(found)!r}, not a mapping of fields. Write them below it."
        )
    return found
