"""NeMo 1's checkpoint settings as arguments of NeMo 2's ``MegatronStrategy``, and as keys of ours.

NeMo 1 kept them in the YAML of a run, below ``model``; where it was silent the code had defaults,
and those of NeMo 2 are others. So that a run does the same as before, a setting is written if the
file says it, and also if it does not and the two defaults differ.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bioinit.errors import ConfigError
from bioinit.keys import suggestion
from bioinit.migrate.files import read_settings
from bioinit.migrate.page import Page, shown, spelled

_DEEPEST = 12
_FORMATS = ("torch_dist", "zarr", "fsdp_dtensor")
_STRICTNESS = {
    "assume_ok_unexpected": ("error", "report"),
    "log_unexpected": ("init", "report"),
    "log_all": ("init", "report"),
    "raise_unexpected": ("error", "report"),
    "raise_all": ("error", "error"),
    "return_unexpected": ("init", "report"),
    "return_all": ("init", "report"),
    "ignore_all": ("init", "report"),
}
"""Megatron-Core's words, and what ``init.on_missing`` and ``init.on_unused`` do in their place."""

_NEVER = "ckpt_load_on_device"
_INCLUDE = "ckpt_include_optimizer"
_STALE = "dist_ckpt"
_SURE = 0.85


def _switch(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _count(value: Any) -> str | None:
    is_count = type(value) is int and value > 0
    return None if value is None or is_count else "a number of processes from 1 on, or null"


def _format(value: Any) -> str | None:
    return None if value in _FORMATS else f"one of {', '.join(_FORMATS)}"


def _strictness(value: Any) -> str | None:
    known = value is None or (isinstance(value, str) and value in _STRICTNESS)
    return None if known else f"null or one of {', '.join(_STRICTNESS)}"


class Setting(NamedTuple):
    """One argument of ``MegatronStrategy``: what it was called, and what is taken in silence."""

    new: str
    old: str | None
    """Its name in NeMo 1; None if it was not there."""
    wrong: Callable[[Any], str | None]
    """What would be right in place of a value, or None if the value is."""
    before: Any
    """What NeMo 1 took where its YAML was silent."""
    default: Any
    """What NeMo 2 takes."""
    meaning: str


_ASYNC = "exp_manager.checkpoint_callback_params.async_save"
SETTINGS = (
    Setting("save_ckpt_format", "dist_ckpt_format", _format, "torch_dist", "torch_dist",
            "how checkpoints are written; what is read says itself what it is"),
    Setting("ckpt_load_directly_on_device", "dist_ckpt_load_on_device", _switch, True, True,
            "zarr only: copy into the memory of the GPU, not through the CPU"),
    Setting("ckpt_parallel_save", "dist_ckpt_parallel_save", _switch, False, True,
            "replicas divide among themselves what is written"),
    Setting("ckpt_parallel_save_within_dp", "dist_ckpt_parallel_save_within_dp", _switch, False,
            False, "they do so within a data-parallel group and not among all"),
    Setting("ckpt_parallel_load", "dist_ckpt_parallel_load", _switch, False, True,
            "replicas each read a part and exchange them"),
    Setting("ckpt_torch_dist_multiproc", "dist_ckpt_torch_dist_multiproc", _count, None, None,
            "writing processes, so files, per rank; torch_dist only; null means 2"),
    Setting("ckpt_assume_constant_structure", "dist_ckpt_assume_constant_structure", _switch, False,
            False, "plan one save and check no later one"),
    Setting("ckpt_parallel_save_optim", "dist_ckpt_parallel_dist_opt", _switch, True, True,
            "a distributed optimizer's state is written by all, and can be divided anew"),
    Setting("ckpt_load_strictness", "dist_ckpt_load_strictness", _strictness, None, None,
            "what becomes of names that model and checkpoint do not share"),
    Setting("ckpt_async_save", "async_save", _switch, False, True,
            "training goes on while a checkpoint is written; torch_dist only"),
    Setting("ckpt_load_optimizer", None, _switch, True, True,
            "the optimizer's state is read when a run is resumed"),
    Setting("ckpt_save_optimizer", None, _switch, True, True,
            "the optimizer's state is written"),
    Setting("ckpt_load_main_params", None, _switch, False, False,
            "the optimizer's copy of the weights is read in place of them"),
)  # fmt: skip
BY_NAME = {s.new: s for s in SETTINGS} | {s.old: s for s in SETTINGS if s.old is not None}
_OLDER = frozenset(s.old for s in SETTINGS if s.old is not None)
_PLACES = ("async_save",)
"""Names that mean a setting of ours only in their own place."""


class Said(NamedTuple):
    """One value as the file has it: its name, where it stands, and the setting that it is."""

    name: str
    at: str
    value: Any


@dataclass(frozen=True)
class Migrated:
    """What became of a file of settings."""

    strategy: Mapping[str, Any]
    """Arguments of ``nemo.lightning.MegatronStrategy``."""
    recipe: Mapping[str, Mapping[str, Any]]
    """The sections of a recipe of ours that do the same."""
    text: str
    """Both as YAML, each line with its reason."""


def migrate_settings(path: str | Path) -> Migrated:
    """The ``dist_ckpt_*`` settings of a NeMo 1 YAML for NeMo 2, and for bioinit.

    Args:
        path: the YAML of a run, of its model, or those settings alone. NeMo 2's names are taken as
            well.

    Raises:
        StorageError: there is no such file.
        ConfigError: it is no YAML, says nothing of checkpoints, has a name that neither NeMo knows,
            or a value that a setting cannot have.
    """
    tree = read_settings(path)
    said = _gathered(tree, str(path))
    accelerator = _accelerator(tree)
    values = {name: found.value for name, found in said.items()}
    for setting in SETTINGS:
        is_older = any(found.name in _OLDER for found in said.values())
        if is_older and setting.new not in values and setting.before != setting.default:
            values[setting.new] = setting.before
    _require_possible(values, str(path))
    page = Page()
    page.remark(f"The checkpoint settings of {path}.")
    _write_strategy(page, values, said)
    recipe = _write_ours(page, values, accelerator)
    return Migrated({s.new: values[s.new] for s in SETTINGS if s.new in values}, recipe, page.text)


def _gathered(tree: Mapping[Any, Any], where: str) -> dict[str, Said]:
    """What the file says, by the name of the argument.

    Raises:
        ConfigError: it says nothing, says one thing twice, or has an unknown or a wrong one.
    """
    found: dict[str, Said] = {}
    for name, at, value in _entries(tree, ""):
        for new in _arguments(name, at, where):
            setting = BY_NAME[new]
            expected = setting.wrong(value)
            if expected is not None:
                hint = suggestion(value, _FORMATS) if isinstance(value, str) else ""
                if isinstance(value, str) and "${" in value:
                    hint = "Write the value that the interpolation stands for."
                raise ConfigError(
                    f"{where}: {at} is {shown(value)!r}, and would have to be {expected}. "
                    f"{hint or 'Correct it.'}"
                )
            before = found.get(new)
            if before is not None and before.value != value:
                raise ConfigError(
                    f"{where}: {before.at} is {shown(before.value)} and {at} is {shown(value)}, "
                    f"and both mean {new}. Leave one of them out."
                )
            found.setdefault(new, Said(name, at, value))
    if not found:
        names = ", ".join(s.old for s in SETTINGS if s.old is not None)
        raise ConfigError(
            f"{where} says nothing of checkpoints: it has none of {names}, at the root or below "
            "model. Give the YAML that the run was started with."
        )
    return found


def _entries(
    tree: Mapping[Any, Any], prefix: str, depth: int = 0
) -> Iterator[tuple[str, str, Any]]:
    """Every value that could be a setting: its name with underscores, its path, itself."""
    for key, value in tree.items():
        at = f"{prefix}{shown(key)}"
        name = str(key).replace("-", "_")
        if isinstance(value, dict) and name.rpartition(".")[2] not in _OLDER:
            if depth < _DEEPEST:
                yield from _entries(value, f"{at}.", depth + 1)
            continue
        # A person may keep what they would type: model.dist_ckpt_format.
        last = name.rpartition(".")[2]
        if last not in _PLACES or at.replace("-", "_").endswith(f"params.{last}") or not prefix:
            yield last, at, value


def _arguments(name: str, at: str, where: str) -> tuple[str, ...]:
    """The arguments that ``name`` means; none if it is no setting of checkpoints.

    Raises:
        ConfigError: it looks like one and is not.
    """
    if name in BY_NAME:
        return (BY_NAME[name].new,)
    if name == _NEVER:
        return ("ckpt_load_directly_on_device",)
    if name == _INCLUDE:
        return ("ckpt_load_optimizer", "ckpt_save_optimizer")
    near = difflib.get_close_matches(name, list(BY_NAME), n=3, cutoff=_SURE)
    if name.startswith(_STALE) or near:
        hint = suggestion(name, [n for n in BY_NAME if n not in _PLACES])
        raise ConfigError(
            f"{where}: {at} is a setting that no version of NeMo has. {hint} Correct the name, or "
            "take it out: NeMo ignores it without a word."
        )
    return ()


def _accelerator(tree: Mapping[Any, Any]) -> str | None:
    trainer = tree.get("trainer")
    found = trainer.get("accelerator") if isinstance(trainer, Mapping) else None
    return found if isinstance(found, str) else None


def _require_possible(values: Mapping[str, Any], where: str) -> None:
    """Refuse what ``MegatronStrategy`` refuses, before a cluster is waited for.

    Raises:
        ConfigError: two settings exclude each other.
    """
    if values.get("ckpt_async_save") and values.get("save_ckpt_format") not in (None, "torch_dist"):
        raise ConfigError(
            f"{where}: ckpt_async_save is true with save_ckpt_format "
            f"{values['save_ckpt_format']!r}, and only torch_dist is written while training goes "
            "on. Write torch_dist, or set async_save to false."
        )
    if values.get("ckpt_load_main_params") and values.get("ckpt_load_optimizer", True):
        raise ConfigError(
            f"{where}: ckpt_load_main_params and ckpt_load_optimizer are both true (the second by "
            "default), and NeMo loads one or the other. Set ckpt_load_optimizer to false."
        )


def _write_strategy(page: Page, values: Mapping[str, Any], said: Mapping[str, Said]) -> None:
    page.gap()
    page.remark("For NeMo 2: arguments of nemo.lightning.MegatronStrategy.")
    for setting in SETTINGS:
        if setting.new not in values:
            continue
        default = f"default {spelled(setting.default)}"
        page.says(
            setting.new,
            values[setting.new],
            f"{default}; {setting.meaning}; {_history(setting, said.get(setting.new))}",
        )


def _history(setting: Setting, said: Said | None) -> str:
    if said is None:
        return f"not in the file, where NeMo 1 took {spelled(setting.before)}"
    if said.name == _NEVER:
        return (
            f"the file says {_NEVER}, which never existed: MegatronStrategy hands it on to DDP "
            "without a word"
        )
    if said.name == _INCLUDE:
        return f"{_INCLUDE} is dropped: it became ckpt_load_optimizer and ckpt_save_optimizer"
    if said.name == setting.new:
        return "its name is NeMo 2's already"
    if setting.new == "ckpt_load_directly_on_device":
        return f"renamed from {said.name} ({_NEVER}, as NVIDIA's guide has it, never existed)"
    if setting.new == "ckpt_assume_constant_structure":
        return f"renamed from {said.name}, which NeMo 1 never read"
    if setting.new == "ckpt_async_save":
        return f"moved here from {_ASYNC}"
    return f"renamed from {said.name}"


def _write_ours(
    page: Page, values: Mapping[str, Any], accelerator: str | None
) -> dict[str, dict[str, Any]]:
    recipe: dict[str, dict[str, Any]] = {}

    def put(section: str, key: str, value: Any, why: str) -> None:
        if section not in recipe:
            page.opens(section)
        recipe.setdefault(section, {})[key] = value
        page.says(key, value, why, depth=1)

    page.gap()
    page.remark("For bioinit: sections that do the same. Put them into a recipe, and only these.")
    page.remark("Do not pass them on: MegatronStrategy takes any name, and ignores these silently.")
    direct = values.get("ckpt_load_directly_on_device")
    if direct is not None:
        is_cuda = direct and accelerator != "cpu"
        why = (
            "ckpt_load_directly_on_device: parameters get memory there, and are read straight into "
            "it from every format"
            if is_cuda
            else "loaded to the CPU; with cuda nothing whole passes through it either"
        )
        put("placement", "device", "cuda" if is_cuda else "cpu", why)
    if "ckpt_parallel_load" in values:
        how = "on" if values["ckpt_parallel_load"] else "off"
        why = (
            "ckpt_parallel_load: replicas each read a part and exchange them; one process does not"
        )
        put("placement", "parallel_load", how, why)
    if "save_ckpt_format" in values:
        written = values["save_ckpt_format"]
        why = "save_ckpt_format"
        if written != "torch_dist":
            why += f" is {written}, which bioinit reads and does not write; NeMo reads this one too"
        put("output", "dialect", "nemo2", "names and config as NeMo 2 has them")
        put("output", "format", "torch_dist", why)
    strictness = values.get("ckpt_load_strictness")
    if strictness is not None:
        missing, unused = _STRICTNESS[strictness]
        why = f"ckpt_load_strictness {strictness}: a parameter that the checkpoint lacks"
        put("init", "on_missing", missing, why)
        put("init", "on_unused", unused, "a stored tensor that nobody wants")
    _write_idle(page, values)
    return recipe


def _write_idle(page: Page, values: Mapping[str, Any]) -> None:
    """What has no key of ours, and why none is needed."""
    found: list[str] = []
    for name, why in _IDLE.items():
        if name in values:
            reason = why if isinstance(why, str) else why[bool(values[name])]
            found.append(f"{name}: {reason}")
    if found:
        page.gap()
        page.remark("No key of bioinit, since these do not apply here:")
        for line in found:
            page.remark(f"- {line}")


_STATE = "bioinit starts from weights, and neither reads nor writes the state of an optimizer"
_IDLE: Mapping[str, str | tuple[str, str]] = {
    "ckpt_parallel_save": (
        "torch_dist is written by all ranks at once, each what lies in its own memory; with "
        "output.format=safetensors rank 0 writes everything",
        "nothing to set: torch_dist is written by all ranks at once, and replicas take turns",
    ),
    "ckpt_parallel_save_within_dp": (
        "the shares follow from where parameters lie; no group is chosen"
    ),
    "ckpt_torch_dist_multiproc": (
        "every rank writes its share as files of about a gigabyte or less, up to four at a time"
    ),
    "ckpt_assume_constant_structure": (
        "a run writes once, so there is no later save to plan for, and every save is checked"
    ),
    "ckpt_parallel_save_optim": _STATE,
    "ckpt_async_save": "the checkpoint is whole when `bioinit init` ends; no training waits for it",
    "ckpt_load_optimizer": _STATE,
    "ckpt_save_optimizer": _STATE,
    "ckpt_load_main_params": _STATE,
}
