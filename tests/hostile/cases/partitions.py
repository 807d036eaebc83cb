"""Models divided over files: GPT-NeoX's layers, DeepSpeed's and Megatron's ranks."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.hostile.corpus import REFUSED, Group, Target, canary
from tests.hostile.craft import STATE, Call, archive, layer_file, pickled, saved, write_layers

GROUP = Group("partitions")
ENGINE = "mp_rank_{:02d}_model_states.pt"


def layers(name: str, change: Callable[[Path], Any], **said: Any) -> None:
    """Two partitions of a model of GPT-NeoX, and ``change``."""

    def make(folder: Path) -> None:
        write_layers(folder)
        change(folder)

    GROUP.add(f"neox_{name}", make, **said)


def edit(file: str, change: Callable[[dict], Any]) -> Callable[[Path], Any]:
    """Load a file, let ``change`` do to it what it wants, and save it again."""

    def of(folder: Path) -> None:
        value = torch.load(folder / file)
        answer = change(value)
        value = answer if isinstance(answer, list) else value
        torch.save(value, folder / file)

    return of


EMBEDDING, LAYER = layer_file(0, 1), layer_file(2, 1)
DENSE = "attention.dense.weight"
layers("partition_is_missing", lambda f: (f / LAYER).unlink(), file=LAYER)
layers("partition_is_cut", lambda f: os.truncate(f / LAYER, 700), file=LAYER)
layers("partition_is_empty", lambda f: (f / LAYER).write_bytes(b""), file=LAYER)
layers(
    "partition_is_garbage",
    lambda f: (f / LAYER).write_bytes(b"x" * 99),
    file=LAYER,
    errors="CorruptCheckpoint|UnknownFormat",
)
layers(
    "partition_of_a_number_of_a_million",
    lambda f: (f / LAYER).rename(f / layer_file(2, 999_999)),
    says="model_01|model_999999",
)
layers(
    "partition_stands_twice",
    lambda f: (f / "layer_2-model_1-model_states.pt").write_bytes((f / LAYER).read_bytes()),
    says="layer_2-model_1",
)
layers("partition_lacks_a_tensor", edit(LAYER, lambda v: v.pop(DENSE)), says="dense")
layers("partition_has_one_more", edit(LAYER, lambda v: v.update(x=torch.ones(1))), says="x")
layers(
    "partition_has_another_dtype",
    edit(LAYER, lambda v: v.update({DENSE: v[DENSE].half()})),
    says="dense",
)
layers(
    "partition_has_other_dims",
    edit(LAYER, lambda v: v.update({DENSE: torch.ones(8)})),
    says="dense",
)
layers(
    "partition_has_another_shape",
    edit(LAYER, lambda v: v.update({DENSE: torch.ones(5, 2)})),
    says="dense",
)
layers(
    "copies_differ",
    edit(LAYER, lambda v: v.update({"input_layernorm.weight": torch.zeros(4)})),
    says="input_layernorm",
)
layers(
    "copies_are_not_numbers",
    edit(LAYER, lambda v: v.update({"input_layernorm.weight": torch.full((4,), float("nan"))})),
    says="input_layernorm",
)
layers(
    "copies_have_another_length",
    edit(LAYER, lambda v: v.update({"input_layernorm.weight": torch.ones(5)})),
    says="input_layernorm",
)
layers("partition_is_a_list", edit(LAYER, lambda v: list(v.values())), kind="either")
layers(
    "partition_runs_code",
    lambda f: (f / LAYER).write_bytes(archive(pickled(Call(os.system, f"touch {canary(f)}")))),
    file=LAYER,
    errors=REFUSED,
)
layers(
    "tensor_runs_code",
    lambda f: (f / LAYER).write_bytes(
        archive(pickled({DENSE: Call(os.system, f"touch {canary(f)}")}))
    ),
    kind="either",
)
layers(
    "engine_runs_code",
    lambda f: (f / ENGINE.format(0)).write_bytes(
        archive(pickled(Call(os.system, f"touch {canary(f)}")))
    ),
    kind="either",
)
layers(
    "engine_says_there_are_more",
    lambda f: torch.save({"mp_world_size": 4}, f / ENGINE.format(0)),
    says="4",
)
layers(
    "engine_says_there_are_an_exabyte",
    lambda f: torch.save({"mp_world_size": 1 << 60}, f / ENGINE.format(0)),
    says=str(1 << 60),
)
layers(
    "two_files_are_swapped",
    lambda f: (
        (f / LAYER).rename(f / "x"),
        (f / EMBEDDING).rename(f / LAYER),
        (f / "x").rename(f / EMBEDDING),
    ),
)


def ranks(name: str, *values: Any, **said: Any) -> None:
    """Ranks of DeepSpeed."""

    def make(folder: Path) -> None:
        for number, value in enumerate(values):
            data = value if isinstance(value, bytes) else saved(value)
            (folder / ENGINE.format(number)).write_bytes(data)

    GROUP.add(f"deepspeed_{name}", make, **said)


HELD = {"module": {"attention.dense.weight": torch.ones(4, 2), "norm.weight": torch.ones(4)}}
FIRST, SECOND = ENGINE.format(0), ENGINE.format(1)
ranks("rank_is_cut", HELD, saved(HELD)[:-40], file=SECOND)
ranks("rank_holds_no_weights", {"module": {}}, says="mp_rank_00")
ranks("rank_holds_only_settings", {"args": {"a": 1}}, says="mp_rank_00|weights")
ranks("ranks_have_other_names", HELD, {"module": {"x": torch.ones(1)}}, says="dense|x|norm")
ranks(
    "ranks_have_other_shapes",
    HELD,
    {"module": {**HELD["module"], "attention.dense.weight": torch.ones(5, 2)}},
    says="dense",
)
ranks(
    "copies_differ",
    HELD,
    {"module": {**HELD["module"], "norm.weight": torch.zeros(4)}},
    says="norm",
)
ranks(
    "parameters_are_empty",
    {"module": {"a": torch.empty(0), "b": torch.ones(1)}},
    errors=REFUSED,
    says="ZeRO-3",
)
ranks("there_should_be_more", {**HELD, "mp_world_size": 7}, says="7")
ranks(
    "module_stands_inside_itself",
    archive(b"\x80\x02}q\x00X\x06\x00\x00\x00moduleq\x01h\x00s."),
    says="mp_rank_00|weights",
)


@GROUP.bad(says="mp_rank_01")
def deepspeed_a_rank_is_missing(folder):
    for number in (0, 2):
        torch.save(HELD, folder / ENGINE.format(number))


@GROUP.bad(errors=REFUSED, says="ZeRO-3")
def deepspeed_sharded_by_zero_3(folder):
    torch.save(HELD, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")


@GROUP.bad(file="latest", errors=f"{REFUSED}|CorruptCheckpoint", says="latest|secret|lead")
def deepspeed_latest_leads_up(folder):
    (folder / "latest").write_text("../secret\n")


@GROUP.bad(errors=f"{REFUSED}|CorruptCheckpoint", says="etc")
def deepspeed_latest_is_absolute(folder):
    (folder / "latest").write_text("/etc\n")


@GROUP.bad(file="latest", says="gone")
def deepspeed_latest_names_what_is_not_there(folder):
    (folder / "latest").write_text("gone\n")


@GROUP.bad(file="latest")
def deepspeed_latest_is_not_utf8(folder):
    (folder / "latest").write_bytes(b"\xff\xfe\x00")


@GROUP.bad(file="latest")
def deepspeed_latest_is_a_mib(folder):
    (folder / "latest").write_bytes(b"x" * (1 << 20))


@GROUP.bad(errors=f"{REFUSED}|CorruptCheckpoint")
def deepspeed_latest_is_empty(folder):
    (folder / "latest").write_bytes(b"")


@GROUP.bad(says="ckpt", errors="CorruptCheckpoint|UnknownFormat|RefusedCheckpoint")
def deepspeed_latest_leads_in_a_circle(folder):
    (folder / "step").symlink_to(".")
    (folder / "latest").write_text("step")


def megatron(name: str, *values: Any, folders: str = "mp_rank_{:02d}", **said: Any) -> None:
    """Ranks of Megatron."""

    def make(folder: Path) -> None:
        for number, value in enumerate(values):
            inner = folder / "iter_0000007" / folders.format(number)
            inner.mkdir(parents=True)
            data = value if isinstance(value, bytes) else saved(value)
            (inner / "model_optim_rng.pt").write_bytes(data)
        (folder / "latest_checkpointed_iteration.txt").write_text("7")

    GROUP.add(f"megatron_{name}", make, **said)


NORM = "language_model.encoder.final_layernorm.weight"
PROJ = "language_model.encoder.layers.0.self_attention.dense.weight"
MODEL = {NORM: torch.ones(4), PROJ: torch.ones(4, 2)}


def rank(**said: Any) -> dict[str, Any]:
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1, "hidden_size": 4}
    args = argparse.Namespace(**sizes | said.pop("args", {}))
    return {"model": dict(MODEL), "args": args, "checkpoint_version": 3.0, "iteration": 7, **said}


megatron("rank_is_missing", rank(), says="1|2")
megatron("rank_is_cut", rank(), saved(rank())[:-30], file="model_optim_rng.pt")
megatron(
    "there_should_be_an_exabyte",
    rank(args={"tensor_model_parallel_size": 1 << 60}),
    rank(),
    says="1152921504606846976|tensor",
)
megatron("sizes_are_negative", rank(args={"tensor_model_parallel_size": -2}), rank(), kind="either")
megatron("sizes_are_text", rank(args={"tensor_model_parallel_size": "2"}), rank(), kind="either")
megatron(
    "ranks_have_other_names", rank(), rank(model={"x": torch.ones(1)}), says="layernorm|x|dense"
)
megatron("copies_differ", rank(), rank(model={**MODEL, NORM: torch.zeros(4)}), says="layernorm")
megatron("model_is_a_list", rank(model=[torch.ones(2)]), rank(), kind="either")
megatron("model_is_missing", {"args": 1}, {"args": 1}, says="model|weights|tensor")
megatron(
    "layers_of_10_to_the_18",
    rank(model={**MODEL, PROJ.replace(".0.", f".{10**18}."): torch.ones(4, 2)}),
    rank(),
    kind="either",
)
megatron(
    "virtual_stages_with_a_gap",
    *[{"model0": dict(MODEL), "model5": dict(MODEL)}] * 2,
    says="model5|model1",
)
megatron("args_run_code", *[rank(args={"x": Call(os.system, "touch CANARY")})] * 2, kind="inert")
megatron("namespace_with_a_target", *[rank(args={"_target_": "os.system"})] * 2, kind="inert")
megatron(
    "pipeline_rank_is_missing",
    rank(args={"pipeline_model_parallel_size": 3}),
    rank(),
    folders="mp_rank_00_{:03d}",
    says="002|3|pipeline",
)


@GROUP.bad(file="latest_checkpointed_iteration.txt", says="9")
def megatron_the_step_is_missing(folder):
    (folder / "iter_0000001").mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text("9")


@GROUP.bad(errors=f"{REFUSED}|CorruptCheckpoint", says="secret")
def megatron_the_pointer_leads_up(folder):
    (folder / "latest_checkpointed_iteration.txt").write_text("../secret")


@GROUP.bad(errors=f"{REFUSED}|CorruptCheckpoint")
def megatron_the_pointer_is_a_number_of_5000_digits(folder):
    (folder / "latest_checkpointed_iteration.txt").write_text("9" * 4000)


@GROUP.bad(errors="AmbiguousFormat", says="iter_0000001")
def megatron_several_steps_and_no_pointer(folder):
    for step in (1, 2):
        (folder / f"iter_000000{step}" / "mp_rank_00").mkdir(parents=True)
        torch.save(rank(), folder / f"iter_000000{step}" / "mp_rank_00" / "model_optim_rng.pt")


@GROUP.good()
def neox_two_partitions(folder):
    write_layers(folder)


@GROUP.good()
def neox_one_partition_without_an_engine(folder):
    write_layers(folder, 1)


@GROUP.good()
def neox_through_latest(folder):
    write_layers(folder / "global_step3")
    (folder / "latest").write_text("global_step3\n")


@GROUP.good()
def deepspeed_one_rank(folder):
    torch.save({"module": STATE, "ds_version": "0.14"}, folder / FIRST)
    return STATE


@GROUP.good()
def megatron_two_ranks(folder):
    for number in (0, 1):
        inner = folder / "iter_0000007" / f"mp_rank_{number:02d}"
        inner.mkdir(parents=True)
        (inner / "model_optim_rng.pt").write_bytes(saved(rank()))
    return Target("iter_0000007")
