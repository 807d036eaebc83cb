"""Checkpoints of GPT-NeoX, divided here by torch and put together by us."""

from __future__ import annotations

import hashlib
import json
import random
import time
from pathlib import Path

import pytest
import torch

from bioinit import formats
from bioinit.contexts.checkpoint import Checkpoint
from bioinit.errors import (
    AmbiguousFormat,
    CheckpointError,
    CorruptCheckpoint,
    UnfinishedCheckpoint,
)
from bioinit.formats._partitions.rules import LONGEST_NAME
from bioinit.storage import Folder

State = dict[str, torch.Tensor]
ROWS = ("query_key_value", "dense_h_to_4h", "word_embeddings", "final_linear")
COLUMNS = ("attention.dense.weight", "dense_4h_to_h.weight")
SUMS = ("attention.dense.bias", "dense_4h_to_h.bias")
PREFIX = "0."


def stored_name(name: str) -> str:
    """How the reader calls what ``write_tiny`` is given as ``name``."""
    return PREFIX + name


def file_name(layer: int, partition: int) -> str:
    return f"layer_{layer:02d}-model_{partition:02d}-model_states.pt"


def write_tiny(folder: Path, state: State) -> None:
    torch.save(dict(state), folder / file_name(0, 0))


def write_layers(folder: Path, layers: dict[int, list[State]]) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for layer, partitions in layers.items():
        for number, state in enumerate(partitions):
            torch.save(state, folder / file_name(layer, number))
    return folder


def a_layer(hidden: int, dtype: torch.dtype = torch.float32) -> State:
    chance = torch.Generator().manual_seed(hidden)
    shapes = {
        "input_layernorm.weight": (hidden,),
        "input_layernorm.bias": (hidden,),
        "attention.query_key_value.weight": (3 * hidden, hidden),
        "attention.query_key_value.bias": (3 * hidden,),
        "attention.dense.weight": (hidden, hidden),
        "attention.dense.bias": (hidden,),
        "attention.rotary_emb.inv_freq": (4,),
        "mlp.dense_h_to_4h.weight": (4 * hidden, hidden),
        "mlp.dense_h_to_4h.bias": (4 * hidden,),
        "mlp.dense_4h_to_h.weight": (hidden, 4 * hidden),
        "mlp.dense_4h_to_h.bias": (hidden,),
    }
    return {k: torch.randn(s, generator=chance).to(dtype) for k, s in shapes.items()}


def divided(state: State, count: int) -> tuple[list[State], State]:
    """``state`` over ``count`` partitions, and what a faithful merge of them gives."""
    parts: list[State] = [{} for _ in range(count)]
    whole = dict(state)
    for name, tensor in state.items():
        if any(word in name for word in SUMS):
            pieces = [torch.randn(tensor.shape).to(tensor.dtype) for _ in range(count)]
            whole[name] = pieces[0]
            for piece in pieces[1:]:
                whole[name] = whole[name] + piece
        elif any(word in name for word in COLUMNS):
            pieces = list(tensor.chunk(count, dim=1))
        elif any(word in name for word in ROWS):
            pieces = list(tensor.chunk(count, dim=0))
        else:
            pieces = [tensor] * count
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece.clone()
    return parts, whole


def opened(folder: Path) -> Checkpoint:
    where = Folder.at(folder)
    name, contents = formats.open_weights(where)
    return Checkpoint(where, name, contents, None)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(
            one.contiguous().view(-1).view(torch.uint8),
            other.contiguous().view(-1).view(torch.uint8),
        )
    )


def remarks(checkpoint: Checkpoint) -> list[str]:
    return [remark for file in checkpoint.files for remark in file.remarks]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merges_every_kind_bit_for_bit(count, dtype, tmp_path):
    hidden = 24
    parts, whole = divided(a_layer(hidden, dtype), count)
    words = {"word_embeddings.weight": torch.randn(48, hidden).to(dtype)}
    readout = {"final_linear.weight": torch.randn(48, hidden).to(dtype)}
    norm = {"norm.weight": torch.randn(hidden).to(dtype)}
    layers = {2: parts}
    expected = {f"2.{name}": tensor for name, tensor in whole.items()}
    for number, state in ((0, words), (4, norm), (5, readout)):
        layers[number] = divided(state, count)[0]
        expected |= {f"{number}.{name}": tensor for name, tensor in state.items()}
    found = opened(write_layers(tmp_path / "it", layers))
    assert found.format == "neox"
    assert set(found.tensors) == set(expected)
    for name, tensor in expected.items():
        assert same_bits(found.read(name), tensor), name
        if tensor.dim() == 2:
            region = ((3, 1), (tensor.shape[0] - 5, tensor.shape[1] - 2))
            assert same_bits(found.read(name, region), tensor[3:-2, 1:-1]), name
    assert found.metadata["parallel"] == {"tensor": count}
    assert remarks(found) == []


def test_sums_are_added_left_to_right_in_the_stored_dtype(tmp_path):
    # In half precision each 0.5 is lost beside 2048; added up first, they would not be.
    parts = [torch.tensor([x], dtype=torch.float16) for x in (2048.0, 1.0, 1.0, 1.0)]
    layers = {2: [{"attention.dense.bias": part} for part in parts]}
    found = opened(write_layers(tmp_path / "it", layers))
    assert found.read("2.attention.dense.bias").item() == 2048.0
    assert sum(parts[1:], torch.zeros(1)).item() + 2048 == 2051
    assert found.metadata["sums"] == ["*.attention.dense.bias"]


def test_a_mean_is_taken_of_copies_that_differ_a_little_and_said(tmp_path):
    one = torch.randn(64, dtype=torch.float32).half()
    two = (one.float() + 1e-3).half()
    layers = {2: [{"input_layernorm.weight": one}, {"input_layernorm.weight": two}]}
    found = opened(write_layers(tmp_path / "it", layers))
    assert remarks(found) == []
    mean = ((one.float() + two.float()) / 2).half()
    assert same_bits(found.read("2.input_layernorm.weight"), mean)
    assert same_bits(found.read("2.input_layernorm.weight", ((7,), (9,))), mean[7:16])
    assert len(remarks(found)) == 1
    assert "2.input_layernorm.weight" in remarks(found)[0] and "mean" in remarks(found)[0]


@pytest.mark.parametrize(("squared", "is_taken"), [(0.99e-4, True), (1.01e-4, False)])
def test_the_tolerance_is_on_the_sum_of_squares_over_the_whole_tensor(squared, is_taken, tmp_path):
    # More elements than one block, each difference far below any single-element tolerance.
    count = 3_000_000
    one = torch.zeros(count, dtype=torch.float32)
    two = torch.full((count,), (squared / count) ** 0.5)
    layers = {2: [{"norm.weight": one}, {"norm.weight": two}]}
    found = opened(write_layers(tmp_path / "it", layers))
    if is_taken:
        assert found.read("2.norm.weight", ((count - 4,), (4,))).tolist() == (two / 2)[:4].tolist()
        return
    with pytest.raises(CorruptCheckpoint, match=r"2\.norm\.weight") as caught:
        found.read("2.norm.weight", ((0,), (1,)))
    assert file_name(2, 0) in str(caught.value) and file_name(2, 1) in str(caught.value)


def test_one_copy_of_many_that_differs_is_found(tmp_path):
    ones = torch.ones(8)
    near = [{"norm.weight": ones}, {"norm.weight": ones}, {"norm.weight": ones + 3e-3}]
    found = opened(write_layers(tmp_path / "near", {2: near}))
    assert same_bits(found.read("2.norm.weight"), (ones + ones + (ones + 3e-3)) / 3)
    far = [{"norm.weight": ones}, {"norm.weight": ones + 6e-3}, {"norm.weight": ones - 6e-3}]
    with pytest.raises(CorruptCheckpoint, match=r"model_01.* and layer_02-model_02"):
        opened(write_layers(tmp_path / "far", {2: far})).read("2.norm.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_copies_that_are_no_numbers_are_equal_only_byte_for_byte(value, tmp_path):
    odd = torch.tensor([1.0, value])
    same = {2: [{"norm.weight": odd}, {"norm.weight": odd}]}
    found = opened(write_layers(tmp_path / "same", same))
    assert same_bits(found.read("2.norm.weight"), odd)
    other = {2: [{"norm.weight": odd}, {"norm.weight": torch.ones(2)}]}
    with pytest.raises(CorruptCheckpoint, match="differ"):
        opened(write_layers(tmp_path / "other", other)).read("2.norm.weight")


def test_whole_numbers_must_be_equal(tmp_path):
    layers = {2: [{"steps": torch.tensor([1, 2])}, {"steps": torch.tensor([1, 3])}]}
    with pytest.raises(CorruptCheckpoint, match="steps"):
        opened(write_layers(tmp_path / "it", layers)).read("2.steps")


def test_copies_may_lie_in_memory_in_any_way(tmp_path):
    wide = torch.randn(40, 30)
    one, two = wide.t()[3:20, 1:33], wide.t()[3:20, 1:33].contiguous()
    layers = {2: [{"rotary_emb.table": one}, {"rotary_emb.table": two}]}
    found = opened(write_layers(tmp_path / "it", layers))
    assert same_bits(found.read("2.rotary_emb.table"), two)
    assert same_bits(found.read("2.rotary_emb.table", ((5, 3), (7, 11))), two[5:12, 3:14])


def test_halves_of_a_gated_layer_are_told_by_the_width_of_the_next(tmp_path):
    gate, other, down = torch.randn(16, 8), torch.randn(16, 8), torch.randn(8, 16)
    parts = [
        {"mlp.linear1.weight": torch.cat([g, o]).clone(), "mlp.linear2.weight": d.clone()}
        for g, o, d in zip(gate.chunk(2), other.chunk(2), down.chunk(2, dim=1), strict=True)
    ]
    found = opened(write_layers(tmp_path / "gated", {2: parts}))
    assert same_bits(found.read("2.mlp.linear1.weight"), torch.cat([gate, other]))
    assert same_bits(found.read("2.mlp.linear2.weight"), down)
    plain = [{**part, "mlp.linear1.weight": part["mlp.linear1.weight"][:8]} for part in parts]
    found = opened(write_layers(tmp_path / "plain", {2: plain}))
    assert same_bits(found.read("2.mlp.linear1.weight"), gate)


def test_llama_layers_of_neox_are_known(tmp_path):
    w1, w2 = torch.randn(24, 8), torch.randn(8, 24)
    parts = [
        {"input_layernorm.scale": torch.ones(8), "mlp.w1.weight": a, "mlp.w2.weight": b}
        for a, b in zip(w1.chunk(3), (x.clone() for x in w2.chunk(3, dim=1)), strict=True)
    ]
    found = opened(write_layers(tmp_path / "it", {2: parts}))
    assert same_bits(found.read("2.mlp.w1.weight"), w1)
    assert same_bits(found.read("2.mlp.w2.weight"), w2)


def test_biases_of_megatron_deepspeed_are_copies(tmp_path):
    state = {
        "self_attention.dense.bias": torch.randn(8),
        "mlp.dense_4h_to_h.bias": torch.randn(8),
        "input_layernorm.weight": torch.randn(8),
    }
    found = opened(write_layers(tmp_path / "it", {3: [state, state]}))
    assert all(same_bits(found.read(f"3.{name}"), tensor) for name, tensor in state.items())
    assert found.metadata["writer"].startswith("Megatron-DeepSpeed")


def test_an_unknown_name_is_divided_as_its_shape_says_and_that_is_said(tmp_path):
    wide, tall = torch.randn(8, 12), torch.randn(12, 8)
    parts = [
        {"norm.weight": torch.ones(8), "new.a": a.clone(), "new.b": b}
        for a, b in zip(wide.chunk(2, dim=1), tall.chunk(2), strict=True)
    ]
    found = opened(write_layers(tmp_path / "it", {2: parts}))
    assert same_bits(found.read("2.new.a"), wide) and same_bits(found.read("2.new.b"), tall)
    assert set(found.metadata["divided_by_shape"]) == {"*.new.a", "*.new.b"}


@pytest.mark.parametrize("shape", [(8, 8), (5, 6), (4,)])
def test_an_unknown_name_whose_shape_does_not_tell_is_an_error(shape, tmp_path):
    state = {"norm.weight": torch.ones(8), "new.weight_of_mine": torch.randn(shape)}
    folder = write_layers(tmp_path / "it", {2: [state, state]})
    with pytest.raises(AmbiguousFormat, match=r"2\.new\.weight_of_mine") as caught:
        opened(folder)
    assert str(shape) in str(caught.value)
    assert opened(write_layers(tmp_path / "one", {2: [state]})).tensors


def test_the_missing_file_is_named(tmp_path):
    parts = divided(a_layer(8), 3)[0]
    folder = write_layers(tmp_path / "it", {2: parts, 3: parts})
    (folder / file_name(3, 1)).unlink()
    with pytest.raises(UnfinishedCheckpoint, match=file_name(3, 1)):
        opened(folder)
    (folder / file_name(2, 1)).unlink()
    with pytest.raises(UnfinishedCheckpoint, match=file_name(2, 1)):
        opened(folder)


def save_engines(folder: Path, count: int, **said: object) -> None:
    for number in range(count):
        torch.save({"module": {}, **said}, folder / f"mp_rank_{number:02d}_model_states.pt")


@pytest.mark.parametrize(
    "said",
    [
        {"mp_world_size": 4},
        {"args": {"model_parallel_size": 4}, "mp_world_size": 4},
        {"args": {"model-parallel-size": 4}},
    ],
)
def test_partitions_that_all_layers_lack_are_missed_where_the_engine_counts_them(said, tmp_path):
    folder = write_layers(tmp_path / "it", {2: divided(a_layer(8), 2)[0]})
    save_engines(folder, 1, **said)
    with pytest.raises(UnfinishedCheckpoint, match=r"2 of 4 .*model_02"):
        opened(folder)


@pytest.mark.parametrize(
    "name", ["mp_rank_01_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt"]
)
def test_partitions_that_all_layers_lack_are_missed_where_other_files_have_them(name, tmp_path):
    folder = write_layers(tmp_path / "it", {2: divided(a_layer(8), 2)[0][:1]})
    (folder / name).write_bytes(b"not readable")
    with pytest.raises(UnfinishedCheckpoint, match=f"model_01.*{name}"):
        opened(folder)
    # With both of the engine's files these could be stages; the shape says that half is missing.
    save_engines(folder, 2, mp_world_size=2)
    with pytest.raises(UnfinishedCheckpoint, match="model_01"):
        opened(folder)


@pytest.mark.parametrize("has_args", [True, False])
def test_the_engines_ranks_count_stages_of_a_pipeline_too(has_args, tmp_path):
    # The 20B model: 2 partitions times 4 stages, and so 8 files of the engine.
    folder = write_layers(tmp_path / "it", {2: divided(a_layer(8), 2)[0]})
    args = {"args": {"model_parallel_size": 2}} if has_args else {}
    save_engines(folder, 8, mp_world_size=8, **args)
    assert opened(folder).metadata["parallel"] == {"tensor": 2}
    if not has_args:
        (folder / "mp_rank_07_model_states.pt").unlink()
        save_engines(folder, 7, mp_world_size=7)
        with pytest.raises(UnfinishedCheckpoint, match="2 of 7"):
            opened(folder)


def test_files_of_two_steps_do_not_belong_together(tmp_path):
    folder = write_layers(tmp_path / "it", {2: divided(a_layer(8), 2)[0]})
    save_engines(folder, 2, iteration=7)
    assert opened(folder).metadata["iteration"] == 7
    torch.save({"iteration": 9}, folder / "mp_rank_01_model_states.pt")
    with pytest.raises(CorruptCheckpoint, match=r"mp_rank_00.* 7, and mp_rank_01.* 9"):
        opened(folder)


@pytest.mark.parametrize(("gone", "named"), [(3, "layer 3"), (4, "2 to 3"), (2, "3 to 4")])
def test_a_layer_that_all_partitions_lack_is_missed(gone, named, tmp_path):
    parts = divided(a_layer(8), 2)[0]
    norm = [{"norm.weight": torch.ones(8)}] * 2
    words = [{"word_embeddings.weight": torch.ones(4, 8)}] * 2
    folder = write_layers(
        tmp_path / "it", {0: words, 2: parts, 3: parts, 4: parts, 6: norm, 7: words}
    )
    save_engines(folder, 2, args={"num-layers": 3})
    assert opened(folder).tensors
    for number in range(2):
        (folder / file_name(gone, number)).unlink()
    with pytest.raises(UnfinishedCheckpoint, match=f"2 of 3 layers.*{named}"):
        opened(folder)


def test_partitions_of_other_shapes_types_or_names_do_not_belong_together(tmp_path):
    one = {"word_embeddings.weight": torch.randn(6, 4)}
    for number, other in enumerate(
        [
            {"word_embeddings.weight": torch.randn(5, 4)},
            {"word_embeddings.weight": torch.randn(6, 4).half()},
            {},
            {**one, "more.weight": torch.ones(2)},
        ]
    ):
        folder = write_layers(tmp_path / str(number), {0: [one, other]})
        with pytest.raises(CorruptCheckpoint, match=file_name(0, 1)):
            opened(folder)


def test_two_files_of_one_place_are_an_error(tmp_path):
    folder = write_layers(tmp_path / "it", {0: [{"word_embeddings.weight": torch.ones(2, 2)}]})
    (folder / "layer_0-model_00-model_states.pt").write_bytes(
        (folder / file_name(0, 0)).read_bytes()
    )
    with pytest.raises(CorruptCheckpoint, match="same place"):
        opened(folder)


def test_what_holds_no_weights_is_listed_and_its_arguments_are_data(tmp_path):
    folder = write_layers(tmp_path / "it", {2: divided(a_layer(8), 2)[0]})
    for number in range(2):
        engine = {"module": {}, "iteration": 7, "args": {"num_layers": 1}, "mp_world_size": 2}
        torch.save(engine, folder / f"mp_rank_{number:02d}_model_states.pt")
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"never opened")
    found = opened(folder)
    assert found.metadata["objects"]["args"] == {"num_layers": 1}
    assert found.metadata["iteration"] == 7
    assert set(found.metadata["ignored"]) == {
        "mp_rank_00_model_states.pt",
        "mp_rank_01_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    }


@pytest.mark.parametrize(
    "text",
    [
        '{\n  "gpt-j-residual": false,\n}\n',
        '{"a": 1, "gpt_j_residual": false}',
        "gpt_j_residual: no\n",
        "'gpt_j_residual' : \"False\"  # yes",
        "# it's of no use\n- {a: 'b # c', gpt_j_residual: off}",
    ],
)
@pytest.mark.parametrize("place", ["configs", "global_step1/configs", "global_step1"])
def test_sums_are_doubted_where_the_settings_say_that_training_kept_copies(text, place, tmp_path):
    folder = write_layers(tmp_path / "global_step1", {2: divided(a_layer(8), 2)[0]})
    assert "doubt" not in opened(folder).metadata
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "model.yml").write_text(text)
    found = opened(folder)
    assert "model.yml says gpt_j_residual: false" in found.metadata["doubt"]
    assert any("gpt_j_residual" in remark for remark in remarks(found))


@pytest.mark.parametrize(
    "text",
    [
        "gpt_j_residual: true",
        "# gpt_j_residual: false",
        "a: b # gpt_j_residual: false",
        "not_gpt_j_residual: false",
        'a: "gpt_j_residual: false"',
        "gpt_j_residual_too: false",
    ],
)
def test_sums_are_not_doubted_for_other_text(text, tmp_path):
    folder = write_layers(tmp_path / "global_step1", {2: divided(a_layer(8), 2)[0]})
    (folder / "model.yml").write_text(text)
    assert "doubt" not in opened(folder).metadata
    # The folder above may hold anything.
    (tmp_path / "other.yml").write_text("gpt_j_residual: false")
    assert "doubt" not in opened(folder).metadata


def test_what_the_engine_saved_counts_more_than_a_file_beside_it(tmp_path):
    folder = write_layers(tmp_path / "it", {2: divided(a_layer(8), 2)[0]})
    save_engines(folder, 2, args={"gpt_j_residual": False})
    assert "saved arguments say gpt_j_residual: false" in opened(folder).metadata["doubt"]
    save_engines(folder, 2, args={"gpt_j_residual": True})
    (folder / "model.yml").write_text("gpt_j_residual: false")
    assert "doubt" not in opened(folder).metadata


@pytest.mark.parametrize(
    "text",
    [
        "\n" * 500_000,
        " " * 1_000_000 + "residual",
        "'residual" + "'" * 900_000,
        'residual"' + '\\"' * 450_000,
        "gpt_j_residual" * 70_000,
        "residual" + " #" * 400_000,
    ],
)
def test_settings_take_time_in_proportion_to_their_length(text, tmp_path):
    folder = write_layers(tmp_path / "it", {2: divided(a_layer(8), 2)[0]})
    (folder / "model.yml").write_text(text)
    begin = time.process_time()
    assert opened(folder).tensors
    assert time.process_time() - begin < 3


def test_summands_that_look_like_copies_are_remarked_on_once(tmp_path):
    same = torch.randn(4).half()
    layer = {"attention.dense.bias": same, "mlp.dense_4h_to_h.bias": torch.zeros(4)}
    found = opened(write_layers(tmp_path / "it", {2: [layer] * 3}))
    assert remarks(found) == []
    for _ in range(2):
        assert same_bits(found.read("2.attention.dense.bias"), same + same + same)
        assert found.read("2.mlp.dense_4h_to_h.bias").tolist() == [0.0] * 4
    (remark,) = remarks(found)
    assert "2.attention.dense.bias: its 3 summands are equal" in remark
    assert "3 times too large" in remark


def test_mamba_is_not_put_together_by_its_shapes_nor_taken_for_savanna(tmp_path):
    layer = {"norm.scale": torch.ones(4), "mixer.in_proj.weight": torch.randn(16, 4)}
    found = opened(write_layers(tmp_path / "one", {2: [layer]}))
    assert found.metadata["writer"] == "GPT-NeoX (DeepSpeed pipeline)"
    with pytest.raises(AmbiguousFormat, match=r"mixer\.in_proj") as caught:
        opened(write_layers(tmp_path / "two", {2: [layer, layer]}))
    assert "rules.py" not in str(caught.value) and "program that wrote" in str(caught.value)


def test_a_tensor_that_claims_more_than_its_file_holds_is_corrupt(tmp_path):
    huge = torch.ones(1).expand(1 << 40)
    folder = write_layers(tmp_path / "it", {2: [{"norm.weight": huge}] * 2})
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        opened(folder)


@pytest.mark.parametrize("unit", ["norm", "layernorm_", "attention.", "a.", "lora", "input_norm."])
def test_long_names_take_no_longer_than_others(unit, tmp_path):
    longest = [unit * (4000 // len(unit)) + str(n) for n in range(20)]
    names = [*longest, *(unit * (LONGEST_NAME // len(unit) - 1) + str(n) for n in range(2000))]
    state = {name: torch.ones(2, dtype=torch.int64) for name in names}
    folder = write_layers(tmp_path / "it", {2: [state, state]})
    begin = time.perf_counter()
    try:
        assert len(opened(folder).tensors) == len(names)
    except AmbiguousFormat:
        assert unit == "lora"
    assert time.perf_counter() - begin < 3


def test_extra_states_are_counted_and_not_read(tmp_path):
    state = {
        "norm.weight": torch.ones(4),
        "mlp._extra_state": torch.ones(9, dtype=torch.uint8),
    }
    found = opened(write_layers(tmp_path / "it", {2: [state, state]}))
    assert set(found.tensors) == {"2.norm.weight"}
    assert found.metadata["byte_objects"] == {"count": 2, "names": ["mlp._extra_state"]}


@pytest.mark.parametrize("seed", range(12))
def test_any_region_is_that_region_of_the_merged_whole(seed, tmp_path):
    chance = random.Random(seed)
    count = chance.choice([2, 3, 5])
    dtype = chance.choice([torch.float32, torch.float16, torch.bfloat16, torch.float64])
    torch.manual_seed(seed)
    parts, whole = divided(a_layer(count * chance.randint(1, 9), dtype), count)
    found = opened(write_layers(tmp_path / "it", {2: parts}))
    for name, tensor in whole.items():
        for _ in range(8):
            offsets = tuple(chance.randint(0, size) for size in tensor.shape)
            rest = [size - low for size, low in zip(tensor.shape, offsets, strict=True)]
            sizes = tuple(chance.randint(0, size) for size in rest)
            expected = tensor
            for dim, (low, size) in enumerate(zip(offsets, sizes, strict=True)):
                expected = expected.narrow(dim, low, size)
            assert same_bits(found.read(f"2.{name}", (offsets, sizes)), expected), (name, offsets)


def test_a_region_of_a_divided_tensor_costs_its_own_bytes(tmp_path):
    state = {"word_embeddings.weight": torch.randn(1024, 256)}
    folder = write_layers(tmp_path / "it", {0: divided(state, 2)[0]})
    found = opened(folder)
    before = sum(file.bytes_read for file in found.files)
    found.read("0.word_embeddings.weight", ((500, 0), (24, 256)))
    assert sum(file.bytes_read for file in found.files) - before == 24 * 256 * 4


def test_a_flipped_bit_is_an_error_of_ours_or_harmless_also_when_read(tmp_path):
    parts = divided(a_layer(4), 2)[0]
    folder = write_layers(tmp_path / "it", {2: parts})
    file = folder / file_name(2, 1)
    whole, chance, caught = file.read_bytes(), random.Random(5), 0
    for _ in range(150):
        at = chance.randrange(len(whole))
        flipped = bytes([whole[at] ^ (1 << chance.randrange(8))])
        file.write_bytes(whole[:at] + flipped + whole[at + 1 :])
        try:
            found = opened(folder)
            for name in found.tensors:
                found.read(name)
        except CheckpointError:
            caught += 1
    assert caught > 0


def to_hf(name: str) -> str:
    layer, _, rest = name.partition(".")
    special = {"word_embeddings.weight": "gpt_neox.embed_in.weight",
               "final_linear.weight": "embed_out.weight"}  # fmt: skip
    if rest in special:
        return special[rest]
    if rest.startswith("norm."):
        return f"gpt_neox.final_layer_norm.{rest[5:]}"
    return f"gpt_neox.layers.{int(layer) - 2}.{rest}"


def test_the_fixture_gives_the_tensors_it_was_divided_from(fixtures_dir):
    expected = json.loads((fixtures_dir / "gpt_neox" / "expected.json").read_text())["tensors"]
    found = opened(fixtures_dir / "gpt_neox")
    assert found.format == "neox"
    wanted = set(expected)
    for name in found.tensors:
        if name.endswith("inv_freq"):
            continue
        tensor = found.read(name).float().contiguous()
        assert list(tensor.shape) == expected[to_hf(name)]["shape"], name
        digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        assert digest == expected[to_hf(name)]["sha256_f32"], name
        wanted.remove(to_hf(name))
    assert not wanted
    # Some of its biases were halved to be divided.
    assert all("2 summands are equal, as copies would be" in remark for remark in remarks(found))
