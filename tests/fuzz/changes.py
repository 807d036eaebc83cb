"""Hostile changes to checkpoints: to a file, as its kind invites, and to which files there are."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.fuzz import binary, dcp, trees
from tests.fuzz.cases import Case, valid
from tests.fuzz.choices import Choices

Spoil = Callable[[bytes, Choices], bytes]

KINDS: tuple[tuple[str, Spoil], ...] = (
    (r".*\.safetensors", binary.spoil_safetensors),
    (r".*(\.json|\.zarray)", trees.spoil_json),
    (r".*\.ya?ml", trees.spoil_yaml),
    (r".*\.metadata", dcp.spoil_index),
    (r".*\.distcp", binary.spoil_bytes),
    (r".*\.nemo", binary.spoil_tar),
    (r"(?s:.*)", binary.spoil_bytes),
)


def spoil_file(name: str, data: bytes, choices: Choices) -> bytes:
    if choices.rarely():
        return binary.spoil_bytes(data, choices)
    if data.startswith(b"\x1f\x8b") and name.endswith(".nemo"):
        return binary.spoil_gzip(data, choices)
    if data.startswith(b"PK") and not name.endswith(".distcp"):
        return binary.spoil_zip(data, choices)
    if re.fullmatch(r".*\.(bin|pt|ckpt)", name):
        return binary.spoil_legacy(data, choices)
    return next(spoil for kind, spoil in KINDS if re.fullmatch(kind, name))(data, choices)


MANY = 100
STRAY = (
    "config.json", "latest", "model.safetensors", "pytorch_model.bin", "common.pt", ".metadata",
    "metadata.json", "context/io.json", "weights/.metadata", "model_config.yaml", "run_config.yaml",
    "latest_checkpointed_iteration.txt", "model.safetensors.index.json", "adapter_config.json",
    "0.0.0", "w/.zarray", "__9_9.distcp", "mp_rank_00/model_optim_rng.pt", "x\ud800.json",
    "layer_00-model_01-model_states.pt", "iter_0000009/common.pt", "mp_rank_00_model_states.pt",
    "weird\n\x1b[31m.safetensors", "model-00002-of-00003.safetensors", "adapter_metadata.json",
)  # fmt: skip
DIGITS = ("0", "1", "00", "01", "7", "99", "999999", "123456789", "00000")


def spoil(case: Case, choices: Choices) -> Case:
    """``case`` with one hostile change."""
    case = dict(case)
    names = sorted(case)
    name = choices.pick(names)
    if choices.hardly() and (groups := list(re.finditer(r"\d+", name))):
        begin, end = choices.pick(groups).span()
        return {**case, **{f"{name[:begin]}{n}{name[end:]}": case[name] for n in range(MANY)}}
    action = choices.below(16)
    if action < 11:
        case[name] = spoil_file(name, case[name], choices)
    elif action == 11 and any(map(dcp.is_index, names)):
        dcp.spoil_item(case, choices)
    elif action == 12:
        if len(case) > 1:
            del case[name]
    elif action == 13:
        groups = list(re.finditer(r"\d+", name))
        if groups:
            begin, end = choices.pick(groups).span()
            case[name[:begin] + choices.pick(DIGITS) + name[end:]] = case.pop(name)
    elif action == 14:
        stray = choices.pick(STRAY)
        case[stray] = case[choices.pick(names)] if choices.byte() % 2 else choices.some(40)
    else:
        case[name] = case[choices.pick(names)]
    return case


def build(target: str, choices: Choices) -> Case:
    """A checkpoint with none to three hostile changes; from no bytes at all a valid one."""
    case = choices.pick(valid(target))
    for _ in range(choices.pick((0, 1, 1, 1, 1, 1, 2, 2, 2, 3))):
        case = spoil(case, choices)
    return case
