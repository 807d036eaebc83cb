"""Megatron's and NeMo 1's folders by rank, against a whole model that is divided here by hand."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bioinit import formats
from bioinit.contexts.checkpoint import Checkpoint
from bioinit.errors import (
    AmbiguousFormat,
    CorruptCheckpoint,
    RefusedCheckpoint,
    UnfinishedCheckpoint,
)
from bioinit.storage import Folder

State = dict[str, torch.Tensor]
HIDDEN = 12
FILE = "model_optim_rng.pt"


def write_tiny(folder: Path, state: State) -> None:
    save(folder / "mp_rank_00" / FILE, {"model": dict(state)})


def write_tiny_nemo(folder: Path, state: State) -> None:
    save(folder / "tp_rank_00_pp_rank_000" / "model_weights.ckpt", dict(state))


def write_tiny_pipeline(folder: Path, state: State) -> None:
    """Two stages: layers in the second half count from 0 there."""
    numbers = sorted({int(n.split(".")[1]) for n in state if n.startswith("layers.")})
    half = -(-len(numbers) // 2)
    stages: list[State] = [{}, {}]
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "layers" and int(parts[1]) >= half:
            stages[1][".".join(["layers", str(int(parts[1]) - half), *parts[2:]])] = tensor
        else:
            stages[0][name] = tensor
    for number, stage in enumerate(stages):
        save(folder / f"tp_rank_00_pp_rank_{number:03d}" / "model_weights.ckpt", stage)


def save(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)


def opened(folder: Path) -> Checkpoint:
    where = Folder.at(folder)
    name, contents = formats.open_weights(where)
    assert name == "megatron_ranks"
    return Checkpoint(where, name, contents, None)


# A model of megatron-core by hand: its whole tensors, and how a rank gets its part of each.
Cut = Callable[[torch.Tensor, int, int], torch.Tensor]


def rows(tensor: torch.Tensor, rank: int, count: int) -> torch.Tensor:
    return tensor.chunk(count, dim=0)[rank]


def columns(tensor: torch.Tensor, rank: int, count: int) -> torch.Tensor:
    return tensor.chunk(count, dim=1)[rank]


def both(tensor: torch.Tensor, rank: int, count: int) -> torch.Tensor:
    gate, other = tensor.chunk(2, dim=0)
    return torch.cat([rows(gate, rank, count), rows(other, rank, count)])


def copied(tensor: torch.Tensor, rank: int, count: int) -> torch.Tensor:
    return tensor


def core_layer(*, gated: bool) -> dict[str, tuple[tuple[int, ...], Cut]]:
    wide = 4 * HIDDEN
    first = 2 * wide if gated else wide
    return {
        "self_attention.linear_qkv.weight": ((3 * HIDDEN, HIDDEN), rows),
        "self_attention.linear_qkv.bias": ((3 * HIDDEN,), rows),
        "self_attention.linear_qkv.layer_norm_weight": ((HIDDEN,), copied),
        "self_attention.linear_proj.weight": ((HIDDEN, HIDDEN), columns),
        "self_attention.linear_proj.bias": ((HIDDEN,), copied),
        "mlp.linear_fc1.weight": ((first, HIDDEN), both if gated else rows),
        "mlp.linear_fc1.bias": ((first,), both if gated else rows),
        "mlp.linear_fc2.weight": ((HIDDEN, wide), columns),
        "mlp.linear_fc2.bias": ((HIDDEN,), copied),
    }


def legacy_layer(*, gated: bool) -> dict[str, tuple[tuple[int, ...], Cut]]:
    wide = 4 * HIDDEN
    first = 2 * wide if gated else wide
    return {
        "input_layernorm.weight": ((HIDDEN,), copied),
        "self_attention.query_key_value.weight": ((3 * HIDDEN, HIDDEN), rows),
        "self_attention.dense.weight": ((HIDDEN, HIDDEN), columns),
        "self_attention.dense.bias": ((HIDDEN,), copied),
        "mlp.dense_h_to_4h.weight": ((first, HIDDEN), both if gated else rows),
        "mlp.dense_4h_to_h.weight": ((HIDDEN, wide), columns),
        "mlp.dense_4h_to_h.bias": ((HIDDEN,), copied),
    }


def whole_model(num_layers: int, *, gated: bool, legacy: bool) -> tuple[State, dict[str, Cut], str]:
    stem = "language_model.encoder.layers." if legacy else "decoder.layers."
    layer = (legacy_layer if legacy else core_layer)(gated=gated)
    table = {f"{stem}{n}.{name}": entry for n in range(num_layers) for name, entry in layer.items()}
    outer: dict[str, tuple[tuple[int, ...], Cut]]
    if legacy:
        outer = {
            "language_model.embedding.word_embeddings.weight": ((24, HIDDEN), rows),
            "language_model.embedding.position_embeddings.weight": ((24, HIDDEN), copied),
            "language_model.encoder.final_layernorm.weight": ((HIDDEN,), copied),
            "lm_head.bias": ((24,), rows),
            "lm_head.dense.weight": ((HIDDEN, HIDDEN), copied),
        }
    else:
        outer = {
            "embedding.word_embeddings.weight": ((24, HIDDEN), rows),
            "decoder.final_layernorm.weight": ((HIDDEN,), copied),
            "output_layer.weight": ((24, HIDDEN), rows),
        }
    table |= outer
    state = {name: torch.randn(shape) for name, (shape, _) in table.items()}
    return state, {name: cut for name, (_, cut) in table.items()}, stem


def stage_of(state: State, stem: str, layers: range, *, first: bool, last: bool) -> State:
    """The tensors of one stage or chunk, its layers counted from 0."""
    found = {}
    for name, tensor in state.items():
        if name.startswith(stem):
            number, _, rest = name.removeprefix(stem).partition(".")
            if int(number) in layers:
                found[f"{stem}{int(number) - layers.start}.{rest}"] = tensor
        elif ("embedding" in name and first) or ("embedding" not in name and last):
            found[name] = tensor
    return found


def part_of(stage: State, cuts: dict[str, Cut], stem: str, rank: int, count: int) -> State:
    by_rest = {name.removeprefix(stem).partition(".")[2]: cut for name, cut in cuts.items()
               if name.startswith(stem)}  # fmt: skip
    return {
        name: (by_rest[name.removeprefix(stem).partition(".")[2]] if name.startswith(stem)
               else cuts[name])(tensor, rank, count).clone()
        for name, tensor in stage.items()
    }  # fmt: skip


def write(
    folder: Path, model: tuple[State, dict[str, Cut], str], bounds: list[int], tensor: int
) -> Path:
    """Stages between the ``bounds``, each over ``tensor`` ranks."""
    state, cuts, stem = model
    stages = len(bounds) - 1
    for number in range(stages):
        layers = range(bounds[number], bounds[number + 1])
        stage = stage_of(state, stem, layers, first=number == 0, last=number == stages - 1)
        for rank in range(tensor):
            name = f"mp_rank_{rank:02d}" + (f"_{number:03d}" if stages > 1 else "")
            args = Namespace(
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=stages,
                hidden_size=HIDDEN,
            )
            value = {
                "args": args,
                "checkpoint_version": 3.0,
                "iteration": 5,
                "model": part_of(stage, cuts, stem, rank, tensor),
                "rng_state": [{"torch_rng_state": torch.zeros(8, dtype=torch.uint8)}],
            }
            save(folder / name / FILE, value)
    return folder


def assert_whole(found: Checkpoint, state: State) -> None:
    weights = {name for name, tensor in found.tensors.items() if tensor.kind == "weight"}
    assert weights == set(state)
    for name, tensor in state.items():
        assert torch.equal(found.read(name), tensor), name


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tensor", [1, 2, 3, 4])
@pytest.mark.parametrize("bounds", [[0, 4], [0, 2, 4], [0, 1, 4], [0, 0, 3, 4]])
def test_ranks_become_the_whole_model(legacy, gated, tensor, bounds, tmp_path):
    model = whole_model(4, gated=gated, legacy=legacy)
    found = opened(write(tmp_path / "it", model, bounds, tensor))
    assert_whole(found, model[0])
    assert found.metadata["parallel"] == {
        "tensor": tensor,
        "pipeline": len(bounds) - 1,
        "expert": 1,
    }


@pytest.mark.parametrize(("stages", "chunks"), [(2, 2), (2, 3), (4, 2)])
def test_chunks_of_a_virtual_pipeline_take_turns(stages, chunks, tmp_path):
    per_chunk = 2
    model = whole_model(stages * chunks * per_chunk, gated=True, legacy=False)
    state, cuts, stem = model
    for stage in range(stages):
        value: dict[str, object] = {"args": Namespace(pipeline_model_parallel_size=stages)}
        for chunk in range(chunks):
            place = chunk * stages + stage
            layers = range(place * per_chunk, (place + 1) * per_chunk)
            whole = stage_of(
                state, stem, layers, first=place == 0, last=place == stages * chunks - 1
            )
            value[f"model{chunk}"] = part_of(whole, cuts, stem, 0, 1)
        value["optimizer"] = {"state": {0: {"exp_avg": torch.ones(3)}}}
        value["whatever"] = {"is": torch.ones(3)}
        save(tmp_path / f"mp_rank_00_{stage:03d}" / FILE, value)
    found = opened(tmp_path)
    assert_whole(found, state)
    assert found.metadata["parallel"]["virtual"] == chunks


def test_layers_that_a_writer_counts_through_all_stages_stay(tmp_path):
    state = {f"decoder.layers.{n}.mlp.linear_fc2.bias": torch.randn(4) for n in range(4)}
    names = list(state)
    for stage, held in enumerate((names[:1], names[1:])):
        save(tmp_path / f"mp_rank_00_{stage:03d}" / FILE, {"model": {n: state[n] for n in held}})
    assert_whole(opened(tmp_path), state)


def test_what_two_stages_hold_is_tied_and_must_be_equal(tmp_path):
    words = torch.randn(6, 4)
    for stage, held in enumerate((words, words)):
        model = {"shared.word_embeddings.weight": held}
        save(tmp_path / "same" / f"mp_rank_00_{stage:03d}" / FILE, {"model": model})
        model = {"shared.word_embeddings.weight": held + stage}
        save(tmp_path / "other" / f"mp_rank_00_{stage:03d}" / FILE, {"model": model})
    assert_whole(opened(tmp_path / "same"), {"shared.word_embeddings.weight": words})
    with pytest.raises(CorruptCheckpoint, match="differ"):
        opened(tmp_path / "other").read("shared.word_embeddings.weight")


@pytest.mark.parametrize("has_args", [True, False])
@pytest.mark.parametrize("is_te", [True, False])
def test_experts_are_numbered_as_in_the_whole(has_args, is_te, tmp_path):
    tensor, expert, per_rank, wide = 2, 2, 3, 8
    state: State = {
        "decoder.layers.0.pre_mlp_layernorm.weight": torch.randn(HIDDEN),
        "decoder.layers.0.mlp.router.weight": torch.randn(6, HIDDEN),
        "decoder.layers.0.self_attention.linear_proj.weight": torch.randn(HIDDEN, HIDDEN),
    }
    stem = "decoder.layers.0.mlp.experts."
    first = (
        f"{stem}linear_fc1.weight{{}}" if is_te else f"{stem}local_experts.{{}}.linear_fc1.weight"
    )
    second = first.replace("fc1", "fc2")
    for number in range(expert * per_rank):
        state[first.format(number)] = torch.randn(2 * wide, HIDDEN)
        state[second.format(number)] = torch.randn(HIDDEN, wide)
    for rank in range(tensor):
        for place in range(expert):
            held = {name: tensor_ for name, tensor_ in state.items() if "experts" not in name}
            held[list(held)[2]] = columns(held[list(held)[2]], rank, tensor).clone()
            for number in range(per_rank):
                source = place * per_rank + number
                held[first.format(number)] = both(state[first.format(source)], rank, tensor)
                held[second.format(number)] = columns(
                    state[second.format(source)], rank, tensor
                ).clone()
            value: dict[str, object] = {"model": held}
            if has_args:
                value["args"] = Namespace(
                    pipeline_model_parallel_size=1, expert_model_parallel_size=expert
                )
            save(tmp_path / f"mp_rank_{rank:02d}_{place:03d}" / FILE, value)
    found = opened(tmp_path)
    assert_whole(found, state)
    assert found.metadata["parallel"] == {"tensor": tensor, "pipeline": 1, "expert": expert}


def test_what_is_no_expert_must_be_equal_in_every_expert_rank(tmp_path):
    name, expert = "decoder.layers.0.self_attention.linear_proj.weight", "local_experts.0"
    for rank in range(2):
        for place in range(2):
            held = {
                name: torch.full((4, 2), rank + 0.5 * (rank * place)),
                f"decoder.layers.0.mlp.experts.{expert}.linear_fc2.weight": torch.ones(4, 2),
            }
            save(tmp_path / f"mp_rank_{rank:02d}_{place:03d}" / FILE, {"model": held})
    found = opened(tmp_path)
    assert found.read(name, ((0, 0), (4, 2))).unique().tolist() == [0.0]
    with pytest.raises(CorruptCheckpoint, match=r"tensor rank 1.*differ"):
        found.read(name)


def test_many_experts_in_one_matrix_are_read_whole_and_refused_divided(tmp_path):
    name = "decoder.layers.0.mlp.experts.weight1"
    held = {"model": {name: torch.randn(4, 16)}}
    save(tmp_path / "one" / "mp_rank_00" / FILE, held)
    assert_whole(opened(tmp_path / "one"), held["model"])
    for rank in range(2):
        save(tmp_path / "two" / f"mp_rank_{rank:02d}" / FILE, held)
    with pytest.raises(RefusedCheckpoint, match="torch_dist"):
        opened(tmp_path / "two")


def test_nemo_1_of_two_tensor_ranks(tmp_path):
    model = whole_model(2, gated=True, legacy=False)
    for rank in range(2):
        part = part_of(model[0], model[1], model[2], rank, 2)
        save(tmp_path / f"mp_rank_{rank:02d}" / "model_weights.ckpt", part)
    found = opened(tmp_path)
    assert_whole(found, model[0])
    assert found.metadata["writer"] == "NeMo 1"


def test_arguments_are_plain_data(tmp_path):
    found = opened(write(tmp_path / "it", whole_model(2, gated=False, legacy=True), [0, 1, 2], 2))
    objects = found.metadata["objects"]
    assert objects["args"] == {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "hidden_size": HIDDEN,
    }
    assert objects["checkpoint_version"] == 3.0 and found.metadata["iteration"] == 5


def test_state_of_the_optimizer_keeps_its_rank(tmp_path):
    for rank in range(2):
        value = {
            "model": {"final_norm.weight": torch.ones(3)},
            "optimizer": {"state": {0: {"exp_avg": torch.full((2,), float(rank))}}},
        }
        save(tmp_path / f"mp_rank_{rank:02d}" / FILE, value)
        (tmp_path / f"mp_rank_{rank:02d}" / "distrib_optim.pt").write_bytes(b"never opened")
    found = opened(tmp_path)
    name = "mp_rank_01.optimizer.state.0.exp_avg"
    assert found.tensors[name].kind == "optimizer"
    assert found.read(name).tolist() == [1.0, 1.0]
    assert found.metadata["ignored"] == {
        f"mp_rank_{rank:02d}/distrib_optim.pt": "state of the optimizer" for rank in range(2)
    }


@pytest.mark.parametrize("gone", ["mp_rank_01_000", "mp_rank_01_001", "mp_rank_00_001"])
def test_a_missing_rank_is_named(gone, tmp_path):
    folder = write(tmp_path / "it", whole_model(2, gated=False, legacy=False), [0, 1, 2], 2)
    (folder / gone / FILE).unlink()
    with pytest.raises(UnfinishedCheckpoint, match=f"{gone}/{FILE}"):
        opened(folder)
    (folder / gone).rmdir()
    with pytest.raises(UnfinishedCheckpoint, match=f"{gone}/{FILE}"):
        opened(folder)


def test_ranks_that_the_arguments_do_not_speak_of_are_an_error(tmp_path):
    for rank in range(2):
        args = Namespace(tensor_model_parallel_size=1)
        held = {"model": {"final_norm.weight": torch.ones(3)}, "args": args}
        save(tmp_path / f"mp_rank_{rank:02d}" / FILE, held)
    with pytest.raises(CorruptCheckpoint, match="arguments say 1"):
        opened(tmp_path)


def test_absurd_sizes_in_the_arguments_cost_nothing(tmp_path):
    args = Namespace(tensor_model_parallel_size=10**12, pipeline_model_parallel_size=10**12)
    save(tmp_path / "mp_rank_00" / FILE, {"model": {"n.weight": torch.ones(3)}, "args": args})
    with pytest.raises(UnfinishedCheckpoint, match="lacks"):
        opened(tmp_path)


def test_fsdp_is_refused_with_the_way_out(tmp_path):
    save(tmp_path / "mp_rank_00_fsdp_shard_00000" / "model_weights.ckpt", {"w": torch.ones(3)})
    with pytest.raises(RefusedCheckpoint, match="FSDP"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["decoder.layers.0.mixer.in_proj.weight", "x.adapter.weight"])
def test_what_shapes_would_mislead_about_is_not_put_together(name, tmp_path):
    held = {"model": {"final_norm.weight": torch.ones(4), name: torch.randn(6, 4)}}
    for rank in range(2):
        save(tmp_path / f"mp_rank_{rank:02d}" / FILE, held)
    with pytest.raises(AmbiguousFormat, match=name.rpartition(".")[0]):
        opened(tmp_path)


def test_ranks_of_two_layouts_side_by_side_are_an_error(tmp_path):
    for name in ("mp_rank_00", "mp_rank_00_001"):
        save(tmp_path / name / FILE, {"model": {"final_norm.weight": torch.ones(4)}})
    with pytest.raises(CorruptCheckpoint, match="two layouts"):
        opened(tmp_path)


def test_query_groups_that_ranks_share_are_refused(tmp_path):
    args = Namespace(num_query_groups=1, group_query_attention=True)
    for rank in range(2):
        held = {"model": {"final_norm.weight": torch.ones(4)}, "args": args}
        save(tmp_path / f"mp_rank_{rank:02d}" / FILE, held)
    with pytest.raises(RefusedCheckpoint, match="query groups"):
        opened(tmp_path)


FUSED = "language_model.transformer.layers.0.attention.query_key_value.weight"


def save_fused(folder: Path, file: str, *, is_apart: bool, **more: object) -> torch.Tensor:
    """Two ranks with one fused tensor each; what they are together."""
    whole = torch.randn(3, 4, 2, HIDDEN)  # queries, keys and values; heads; their width
    if not is_apart:
        whole = whole.transpose(0, 1)
    for rank, part in enumerate(whole.chunk(2, dim=1 if is_apart else 0)):
        held = {"model": {FUSED: part.reshape(-1, HIDDEN).clone()}, **more}
        save(folder / f"mp_rank_{rank:02d}" / file, held)
    return whole.reshape(-1, HIDDEN)


@pytest.mark.parametrize("version", [0, 1.0, 3.0])
def test_the_first_version_keeps_queries_keys_and_values_of_a_rank_apart(version, tmp_path):
    whole = save_fused(tmp_path, FILE, is_apart=version == 0, checkpoint_version=version)
    found = opened(tmp_path)
    assert torch.equal(found.read(FUSED), whole)
    assert found.metadata["objects"]["checkpoint_version"] == version
    assert "doubt" not in found.metadata


@pytest.mark.parametrize(
    ("file", "args", "is_apart"),
    [
        (FILE, {}, True),
        (FILE, {"args": Namespace(model_parallel_size=2)}, True),
        (FILE, {"args": Namespace(tensor_model_parallel_size=2)}, False),
        ("model_weights.ckpt", {}, False),
    ],
)
def test_without_a_version_files_are_read_as_their_writer_would_and_that_is_said(
    file, args, is_apart, tmp_path
):
    whole = save_fused(tmp_path, file, is_apart=is_apart, **args)
    found = opened(tmp_path)
    assert torch.equal(found.read(FUSED), whole)
    doubt = found.metadata.get("doubt", "")
    assert ("no checkpoint_version" in doubt) is (file == FILE)  # NeMo 1 never states one
    assert ("apart" in doubt) is is_apart


def test_a_version_is_not_missed_where_it_makes_no_difference(tmp_path):
    save(tmp_path / "one" / "mp_rank_00" / FILE, {"model": {FUSED: torch.ones(6, 2)}})
    for rank in range(2):
        held = {"model": {"final_norm.weight": torch.ones(4)}}
        save(tmp_path / "two" / f"mp_rank_{rank:02d}" / FILE, held)
    assert all("doubt" not in opened(tmp_path / name).metadata for name in ("one", "two"))


def test_ranks_of_two_steps_do_not_belong_together(tmp_path):
    for rank in range(2):
        held = {"model": {"final_norm.weight": torch.ones(4)}, "iteration": rank + 1}
        save(tmp_path / f"mp_rank_{rank:02d}" / FILE, held)
    with pytest.raises(CorruptCheckpoint, match=r"mp_rank_00/.* 1, and mp_rank_01/.* 2"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("stages", "named"),
    [([[0, 2, 3]], "layer 1"), ([[0, 1, 2]], "0 to 2"), ([[0], [0, 1]], "0 to 2")],
)
def test_a_layer_that_all_ranks_lack_is_missed(stages, named, tmp_path):
    args = Namespace(num_layers=4, pipeline_model_parallel_size=len(stages))
    for stage, numbers in enumerate(stages):
        model = {f"decoder.layers.{n}.mlp.linear_fc2.bias": torch.ones(4) for n in numbers}
        save(tmp_path / f"mp_rank_00_{stage:03d}" / FILE, {"model": model, "args": args})
    with pytest.raises(UnfinishedCheckpoint, match=f"3 of 4 layers.*{named}"):
        opened(tmp_path)
    args.num_layers = 3
    save(
        tmp_path / "mp_rank_00_000" / FILE,
        {
            "model": {f"decoder.layers.{n}.mlp.linear_fc2.bias": torch.ones(4) for n in stages[0]},
            "args": args,
        },
    )
    assert len(opened(tmp_path).tensors) == 3


def test_layers_may_be_empty_where_each_has_a_shape_of_its_own(tmp_path):
    args = Namespace(num_layers=4, heterogeneous_layers_config_path="x.json")
    held = {"model": {"decoder.layers.0.mlp.linear_fc2.bias": torch.ones(4)}, "args": args}
    save(tmp_path / "mp_rank_00" / FILE, held)
    assert opened(tmp_path).tensors


def test_t5_of_nemo_1_is_put_together(tmp_path):
    stem = "enc_dec_model.enc_dec_model.encoder.model.layers.0."
    table = {
        f"{stem}input_layernorm.weight": (torch.ones(4), copied),
        f"{stem}mlp.dense_h_to_4h.weight": (torch.randn(8, 4), rows),
        f"{stem}mlp.dense_h_to_4h_2.weight": (torch.randn(8, 4), rows),
        f"{stem}mlp.dense_h_to_4h_2.bias": (torch.randn(8), rows),
        f"{stem}mlp.dense_4h_to_h.weight": (torch.randn(4, 8), columns),
        "enc_dec_model.tokens_head.bias": (torch.randn(6), rows),
        "enc_dec_model.relative_position_embedding.weight": (torch.randn(32, 4), copied),
    }
    for rank in range(2):
        held = {name: cut(tensor, rank, 2).clone() for name, (tensor, cut) in table.items()}
        save(tmp_path / f"mp_rank_{rank:02d}" / "model_weights.ckpt", held)
    found = opened(tmp_path)
    assert_whole(found, {name: tensor for name, (tensor, _) in table.items()})
    assert "divided_by_shape" not in found.metadata
