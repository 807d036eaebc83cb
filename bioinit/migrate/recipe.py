"""A run file of BioNeMo, as a recipe of ours: every key of it is there, in force or as a remark.

The file is what ``bionemo-esm2-train --config`` and ``bionemo-geneformer-train --config`` take: a
``MainConfig`` of pydantic. A recipe starts a model and trains none, so of its sections the model's
is carried over; the others belong to whoever trains, and are kept as remarks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bioinit import families
from bioinit.errors import ConfigError
from bioinit.keys import suggestion
from bioinit.migrate import bionemo
from bioinit.migrate.bionemo import (
    DATA,
    EXPERIMENT,
    KINDS,
    LISTED,
    MODEL,
    NEMO1,
    PARALLEL,
    PATH,
    SKIPPED,
    TRAINING,
)
from bioinit.migrate.files import read_settings
from bioinit.migrate.page import Page, listed, literally, shown
from bioinit.migrate.run import HEADS, RunFile
from bioinit.migrate.skipped import carried_over
from bioinit.record import build, make_record
from bioinit.record import shown as plain

_LABELS = {"token_classification": "cnn_num_classes", "sequence_classification": "mlp_target_size"}
_COUNTED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels")
_MOST_LAYERS = 1000
_NEW_HEAD = "classifier"
_START = "start"


def migrate_recipe(path: str | Path, family: str | None = None) -> str:
    """A recipe, as YAML, that starts the model of a BioNeMo run.

    Args:
        path: the YAML of the run, with a section ``bionemo_model_config``.
        family: ``esm2`` or ``biobert``, where neither the file nor its checkpoint says which.

    Raises:
        StorageError: there is no such file.
        ConfigError: it is no YAML, no run of BioNeMo, has a misspelt key, or a value that its field
            cannot have.
    """
    where = str(path)
    run = RunFile(where, read_settings(path))
    name, why = (family, "as you say") if family is not None else run.family()
    if name not in KINDS:
        raise ConfigError(
            f"the family is {name!r} ({why}), and BioNeMo trains {' and '.join(KINDS)} by such "
            f"files. {suggestion(name, KINDS)} `bioinit migrate context` makes a recipe of a "
            "checkpoint of any family."
        )
    page = Page()
    page.remark(f"The run of {where}, started by bioinit: bioinit plan recipe=./mine.yaml")
    page.remark(f"Family: {name}, {why}. Another one is chosen with --family.")
    _Recipe(page, run, name).write()
    return page.text


class _Recipe:
    """Writes the page."""

    def __init__(self, page: Page, run: RunFile, family: str) -> None:
        self.page = page
        self.run = run
        self.family = family
        self.task = run.task()
        read = run.described(family)
        self.account = {field.name: field for field in read.account}
        self.fields = {
            ours: plain(field.value)
            for ours, field in read.fields.items()
            if field.literal and (ours != "vocab_size" or "vocab_size" in run.model)
        }
        self.config = families.load(family).config
        self.mapped: dict[str, str] = {}
        """What became of fields of the model's section that no table of fields knows."""

    def write(self) -> None:
        head = self._head()
        page = self.page
        page.gap()
        page.opens("defaults")
        page.item(f"/recipe/{self.family}/{self.task}")
        page.item({"override /model": None})
        page.item("_self_")
        page.gap()
        page.opens("model")
        self._write_start(head)
        self._write_fields()
        self._write_init()
        self._write_placement()
        self._write_output()
        self._write_others()

    def _head(self) -> dict[str, Any]:
        key = _LABELS.get(self.task)
        count = None if key is None else self.run.model.get(key)
        if key is not None and count is not None:
            self.mapped[key] = "model.num_labels"
            return {"num_labels": count}
        return {}

    def _write_start(self, head: Mapping[str, Any]) -> None:
        run, page = self.run, self.page
        key = NEMO1 if run.model.get(NEMO1) else PATH
        why = f"{MODEL}.{key}" + ("; a .nemo of NeMo 1 is read as it is" if key == NEMO1 else "")
        page.says(PATH, literally(run.checkpoint), why, depth=1)
        for name, value in head.items():
            page.says(name, value, f"{MODEL}.{_LABELS[self.task]}, of a new head", depth=1)
        prefixes = [_NEW_HEAD] if self.task != "masked_lm" else []
        silent = []
        others = [prefix for prefix in run.skipped if prefix not in HEADS]
        for prefix, here in self._carried(others).items():
            prefixes += [name for name in here if name not in prefixes]
            silent += [] if here else [prefix]
        if prefixes and run.checkpoint is not None:
            why = f"{listed(run.skipped)} in the file; these are the model's names here"
            if not run.saved and "num_layers" not in self.fields:
                why += ", of as many layers as the family has by default"
            page.says(SKIPPED, prefixes, why, depth=1)
        if silent:
            page.remark(f"{SKIPPED} has {listed(silent)}, which no name of this model has.", 1)
        elif run.skipped and run.checkpoint is None:
            page.remark(
                f"{SKIPPED} {listed(run.skipped)}: nothing is loaded, so nothing skipped", 1
            )
        self._write_listed()

    def _carried(self, prefixes: list[str]) -> Mapping[str, tuple[str, ...]]:
        if not prefixes or self.config is None:
            return {}
        layers = self.fields.get("num_layers", 0)
        if isinstance(layers, int) and layers > _MOST_LAYERS:
            raise ConfigError(
                f"{self.run.where}: {MODEL}.num_layers is {layers}, and to carry {SKIPPED} over, "
                f"the names of at most {_MOST_LAYERS} layers are looked at. Correct it."
            )
        counted = {name: self.run.saved[name] for name in _COUNTED if name in self.run.saved}
        fields = {**self.fields, **counted, "architecture": self.task}
        record = make_record(self.config, fields, {}, at="model")
        return carried_over(prefixes, families.load(self.family), build(record, at="model"))

    def _write_listed(self) -> None:
        names = families.load(self.family).dialects["nemo2"].fields
        ours = [names[name] for name in self.run.listed if name in names]
        left = [name for name in self.run.listed if name not in names]
        if ours:
            self.page.says(LISTED, ours, f"{MODEL}.{LISTED}", depth=1)
        if left:
            why = "no field of the model's architecture, so no checkpoint decides it here"
            self.page.remark(f"{LISTED} {listed(left)}: {why}.", 1)

    def _write_fields(self) -> None:
        """The model's own fields, each beside the key that it had."""
        run, page = self.run, self.page
        if self.config is not None:
            # A wrong value is said now, and not when the recipe is run.
            fields = {**self.fields, **self._head(), "architecture": self.task}
            record = make_record(self.config, fields, {}, at="model")
            if run.checkpoint is None:  # else the checkpoint may have others
                build(record, at="model")
        named = {field.note: field.name for field in self.account.values()}
        for ours, value in self.fields.items():
            theirs = named.get(ours, ours)
            said = f"{MODEL}.{theirs}"
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(
                    f"{run.where}: {said} is {value}, and no model has that. Correct it."
                )
            why = said if theirs in run.model else f"BioNeMo's default of {said}"
            if ours == "seq_length" and run.sections[DATA].get("seq_length") is not None:
                why = f"{DATA}.seq_length, which BioNeMo puts in place of the model's"
            page.says(ours, literally(value), why, depth=1)
        started = NEMO1 if run.model.get(NEMO1) else PATH
        for key, value in run.model.items():
            if key in (started, SKIPPED, LISTED) or key in self.mapped:
                continue
            field = self.account.get(str(key))
            if field is not None and field.fate == "mapped" and field.note in self.fields:
                continue
            page.remark(f"{shown(key)}: {shown(value)} ({self._reason(str(key))})", 1)

    def _reason(self, key: str) -> str:
        field = self.account.get(key)
        if key not in bionemo.FIELDS:
            return "no class of BioNeMo has it; a class of your own decides what it means"
        if key == "encoder_frozen":
            return "see init"
        if key in (PATH, NEMO1):
            return "nothing is read from there"
        if field is None or field.fate == "mapped":
            return "nothing is said by it"
        return field.note

    def _write_init(self) -> None:
        run = self.run
        entries: list[tuple[str, Any, str]] = []
        if run.checkpoint is not None:
            why = "what the checkpoint says wins, as in BioNeMo; the plan shows what lost"
            entries.append(("on_conflict", "checkpoint", why))
        is_frozen = run.model.get("encoder_frozen", False)
        if not isinstance(is_frozen, bool):
            raise ConfigError(
                f"{run.where}: {MODEL}.encoder_frozen is {shown(is_frozen)!r}, neither true nor "
                "false. Correct it."
            )
        if is_frozen:
            entries.append(("frozen", [f"{KINDS[self.family].body}.**"], "encoder_frozen"))
        self._write_section("init", entries)

    def _write_placement(self) -> None:
        run = self.run
        stated = run.sections[TRAINING].get("precision")
        word, why = stated, f"{TRAINING}.precision, in which BioNeMo keeps parameters"
        if stated is None:
            word, why = run.model.get("params_dtype"), f"{MODEL}.params_dtype"
        if word is not None and str(word) not in bionemo.PRECISIONS:
            raise ConfigError(
                f"{run.where}: {why.partition(',')[0]} is {shown(word)!r}, which is no precision. "
                f"{suggestion(str(word), bionemo.PRECISIONS)} Choose from "
                f"{', '.join(bionemo.PRECISIONS)}."
            )
        dtype = None if word is None else bionemo.PRECISIONS[str(word)]
        is_on_gpu = str(run.sections[TRAINING].get("accelerator")) in ("gpu", "cuda")
        sharing = self._sharing()
        if not (dtype or is_on_gpu or sharing):
            return
        self._write_section("placement", [("dtype", dtype, why if dtype else "as stored")])
        if is_on_gpu:
            why = f"{TRAINING}.accelerator: where training runs; in force, it is loaded there"
            self.page.would_say("device", "cuda", why, depth=1)
        if sharing:
            start = f"under torchrun, {run.size('num_devices')} processes on each of"
            hosts = f"{run.size('num_nodes')} hosts, put these in force:"
            self.page.remark(f"{PARALLEL}: {start} {hosts}", 1)
        for key, value, because in sharing:
            self.page.would_say(key, value, because, depth=1)

    def _sharing(self) -> list[tuple[str, Any, str]]:
        """How processes share the model: remarks, since who starts them says how many."""
        run = self.run
        world = run.size("num_devices") * run.size("num_nodes")
        tensor, pipeline = (run.size(f"{k}_model_parallel_size") for k in ("tensor", "pipeline"))
        if world * tensor * pipeline == 1:
            return []
        if tensor == pipeline == 1:
            return [("strategy", "ddp", "each has the whole model")]
        if pipeline == 1:
            mesh = {"tp": tensor}
            why = "tensor parallelism; the other axes take the rest"
            return [("strategy", "fsdp2+tp", why), ("mesh", mesh, "tensor_model_parallel_size")]
        why = "pipelines are Megatron's: set model.backend=megatron, where the family has it"
        return [
            ("strategy", "megatron", why),
            ("mesh", {"tp": tensor, "pp": pipeline}, "model parallel sizes"),
        ]

    def _write_output(self) -> None:
        section = self.run.sections[EXPERIMENT]
        folder = self.run.text_at(EXPERIMENT, "result_dir")
        if folder:
            name = self.run.text_at(EXPERIMENT, "experiment_name")
            target = str(Path(folder, *([name] if name else []), _START))
            why = "result_dir and experiment_name; BioNeMo's own results may lie beside it"
            self.page.gap()
            self.page.says("output_dir", literally(target), why)
            self.page.remark(
                "It is written for transformers; output.dialect=nemo2 writes it for NeMo 2."
            )
        if section.get("restore_from_checkpoint_path"):
            self.page.remark(
                "restore_from_checkpoint_path goes on with a run, its optimizer included; bioinit "
                f"starts one from weights. For these, set model.{PATH}."
            )

    def _write_section(self, name: str, entries: list[tuple[str, Any, str]]) -> None:
        if entries:
            self.page.gap()
            self.page.opens(name)
        for key, value, why in entries:
            self.page.says(key, value, why, depth=1)

    def _write_others(self) -> None:
        """The other sections, key by key: what a recipe says nothing of."""
        page = self.page
        if not (self.run.others or any(self.run.sections[name] for name in bionemo.SECTIONS)):
            return
        page.gap()
        page.remark("What else the file says. A recipe starts a model and trains none:")
        for name, (why, _) in bionemo.SECTIONS.items():
            section = self.run.sections[name]
            if section:
                page.remark(f"{name} ({why}):")
            for key, value in section.items():
                page.remark(f"  {shown(key)}: {shown(value)}")
        for key, value in self.run.others.items():
            page.remark(f"{shown(key)}: {shown(value)} (no section of BioNeMo's)")
