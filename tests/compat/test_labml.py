"""What stands in for labml's GPT-NeoX: the same values on good input, an error on bad input."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bioinit.compat import labml
from bioinit.errors import CheckpointError, ConfigError, StorageError

# ------------------------------------------------------------------ the names of the files


def test_the_files_of_the_20b_model_are_those_of_the_original():
    files = labml.get_files_to_download()
    assert files[:5] == [
        "20B_tokenizer.json",
        "configs/20B.yml",
        "latest",
        "global_step150000/layer_00-model_00-model_states.pt",
        "global_step150000/layer_00-model_01-model_states.pt",
    ]
    assert len(files) == len(set(files)) == 105
    # of the original's list, its lines joined by line ends
    assert hashlib.sha256("\n".join(files).encode()).hexdigest() == (
        "f5180cc20992f5985857adac9bb8d0acc4f8c0f91a24255305dcc1eac9296f82"
    )


def test_fewer_layers_of_it_keep_the_numbers_of_norm_and_readout():
    step = "global_step150000"
    assert labml.get_files_to_download(1) == [
        "20B_tokenizer.json",
        "configs/20B.yml",
        "latest",
        *(
            f"{step}/layer_{layer}-model_{part}-model_states.pt"
            for layer in ("00", "02", "47", "48")
            for part in ("00", "01")
        ),
        *(f"{step}/mp_rank_0{rank}_model_states.pt" for rank in range(8)),
    ]


def test_other_depths_and_partitions_have_their_own_numbers():
    files = labml.get_files_to_download(
        3, depth=3, partitions=4, step="global_step10", beside=("latest",), ranks=0
    )
    assert files == [
        "latest",
        *(
            f"global_step10/layer_0{layer}-model_0{part}-model_states.pt"
            for layer in (0, 2, 3, 4, 6, 7)
            for part in range(4)
        ),
    ]


@pytest.mark.parametrize(("wanted", "depth"), [(45, 44), (4, 3), (-1, 44)])
def test_more_layers_than_there_are_is_an_error(wanted, depth):
    with pytest.raises(ConfigError, match=f"{wanted} layers of a model that has {depth}"):
        labml.get_files_to_download(wanted, depth=depth)


# ------------------------------------------------------------------ merging

# Observed by running the original's functions: kind, dtypes of file and parameter, the two
# partitions, the result.
OBSERVED = [
    (
        "dim_0",
        "float32",
        "float32",
        [[0.0, 1.0], [2.0, 3.0]],
        [[4.0, 5.0]],
        [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]],
    ),
    (
        "dim_0",
        "float16",
        "float32",
        [0.0999755859375, 0.333251953125],
        [65504.0, -5.960464477539063e-08],
        [0.0999755859375, 0.333251953125, 65504.0, -5.960464477539063e-08],
    ),
    (
        "dim_1",
        "float16",
        "bfloat16",
        [[0.0999755859375], [1.0009765625]],
        [[0.300048828125, 0.5], [0.333251953125, 7.0]],
        [[0.10009765625, 0.30078125, 0.5], [1.0, 0.333984375, 7.0]],
    ),
    (
        "sum",
        "float16",
        "float32",
        [0.0999755859375, 1.0, 2048.0, 0.300048828125],
        [0.199951171875, 0.0004000663757324219, 1.0, -0.0999755859375],
        [0.2998046875, 1.0, 2048.0, 0.2000732421875],
    ),
    (
        "sum",
        "bfloat16",
        "float32",
        [0.10009765625, 256.0],
        [0.2001953125, 1.0],
        [0.30078125, 256.0],
    ),
    (
        "sum",
        "float32",
        "float16",
        [[0.10000000149011612, 3.0]],
        [[0.20000000298023224, 4.0]],
        [[0.300048828125, 7.0]],
    ),
    (
        "duplicate",
        "float16",
        "float32",
        [0.0999755859375, 1.0, -3.5],
        [0.0999755859375, 1.0, -3.5],
        [0.0999755859375, 1.0, -3.5],
    ),
    (
        "duplicate",
        "float16",
        "float32",
        [0.0999755859375, 1.0, 0.25],
        [0.10009765625, 1.0009765625, 0.250244140625],
        [0.10003662109375, 1.0, 0.25],
    ),
    (
        "duplicate",
        "bfloat16",
        "float32",
        [0.10009765625, 0.010009765625],
        [0.1005859375, 0.010009765625],
        [0.1005859375, 0.010009765625],
    ),
    (
        "duplicate",
        "float32",
        "float32",
        [0.10000000149011612, 1.0],
        [0.10029999911785126, 1.003999948501587],
        [0.10015000402927399, 1.0019999742507935],
    ),
]
MERGE = {
    "dim_0": labml.merge_params_dim_0,
    "dim_1": labml.merge_params_dim_1,
    "duplicate": labml.merge_params_duplicate,
    "sum": labml.merge_params_sum,
}


@pytest.mark.parametrize(("kind", "stored", "kept", "p1", "p2", "result"), OBSERVED)
def test_a_merge_gives_what_the_original_gave(kind, stored, kept, p1, p2, result):
    one, two = (torch.tensor(part, dtype=getattr(torch, stored)) for part in (p1, p2))
    expected = torch.tensor(result, dtype=getattr(torch, kept))
    param = nn.Parameter(torch.full_like(expected, 7.0))
    memory = param.data_ptr()
    assert MERGE[kind](param, "w", {"w": one}, {"w": two}) is None
    assert torch.equal(param, expected) and param.dtype == expected.dtype
    assert param.data_ptr() == memory and param.requires_grad


def test_plain_tensors_and_views_are_filled_too():
    whole = torch.zeros(4, 6)
    labml.merge_params_dim_1(
        whole.t()[:4], "w", {"w": torch.ones(4, 1)}, {"w": torch.full((4, 3), 2.0)}
    )
    assert whole[:, 0].tolist() == [1, 2, 2, 2] and whole[:, 4:].sum() == 0


def test_there_may_be_more_than_two_partitions():
    parts = [{"w": torch.arange(6.0).view(2, 3) + 10 * n} for n in range(3)]
    rows, columns, total = torch.empty(6, 3), torch.empty(2, 9), torch.empty(2, 3)
    labml.merge_params_dim_0(rows, "w", *parts)
    labml.merge_params_dim_1(columns, "w", *parts)
    labml.merge_params_sum(total, "w", *parts)
    assert torch.equal(rows, torch.cat([p["w"] for p in parts]))
    assert torch.equal(columns, torch.cat([p["w"] for p in parts], dim=1))
    assert torch.equal(total, torch.arange(6.0).view(2, 3) * 3 + 30)


def test_copies_of_any_number_of_dims_are_held_against_each_other():
    param = torch.zeros(2, 3)
    one = torch.arange(6.0).view(2, 3)
    labml.merge_params_duplicate(param, "w", {"w": one}, {"w": one + 1e-3})
    assert torch.allclose(param, one + 5e-4)
    with pytest.raises(labml.PartitionsDiffer, match=r"partitions do not match: w\b.*0\.0006"):
        labml.merge_params_duplicate(param, "w", {"w": one}, {"w": one + 1e-2})


@pytest.mark.parametrize("bad", [float("nan"), 1.0])
def test_copies_that_differ_are_an_error_that_assertions_catch_as_before(bad):
    param, copy = torch.full((3,), 7.0), torch.zeros(3)
    other = torch.tensor([0.0, bad, 0.0])
    with pytest.raises(AssertionError, match=r"The partitions do not match: norm\.weight"):
        labml.merge_params_duplicate(
            param, "norm.weight", {"norm.weight": copy}, {"norm.weight": other}
        )
    assert param.tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    ("merge", "param", "one", "two"),
    [
        ("dim_0", (4, 3), (2, 3), (1, 3)),  # the original broadcast the second
        ("dim_0", (4, 3), (2, 1), (2, 3)),
        ("dim_0", (4, 3), (2, 3), (3, 3)),
        ("dim_1", (4,), (2,), (2,)),
        ("dim_1", (3, 4), (3, 2), (3, 1)),
        ("duplicate", (4,), (1,), (1,)),  # and these
        ("sum", (4,), (1,), (1,)),
        ("sum", (4,), (4,), (1,)),
        ("sum", (2, 3), (3,), (3,)),
    ],
)
def test_shapes_that_do_not_fit_are_an_error_and_nothing_is_broadcast(merge, param, one, two):
    target = torch.full(param, 7.0)
    with pytest.raises(labml.WrongShape, match="'w'") as caught:
        MERGE[merge](target, "w", {"w": torch.ones(one)}, {"w": torch.ones(two)})
    assert isinstance(caught.value, ConfigError) and isinstance(caught.value, RuntimeError)
    assert (target == 7).all()


def test_a_key_that_a_partition_lacks_is_named():
    with pytest.raises(KeyError) as caught:
        labml.merge_params_sum(torch.ones(2), "bias", {"bias": torch.ones(2)}, {"biass": 0})
    assert str(caught.value).startswith("partition 1 of 2 holds no tensor 'bias'")
    assert isinstance(caught.value, CheckpointError) and "'biass'" in str(caught.value)


def test_a_parameter_on_meta_has_nothing_to_be_filled():
    with pytest.raises(ConfigError, match="on meta"):
        labml.merge_params_sum(
            torch.ones(2, device="meta"), "b", {"b": torch.ones(2)}, {"b": torch.ones(2)}
        )


# ------------------------------------------------------------------ files and layers

SIZES = {"n_vocab": 128, "n_hidden": 64, "n_layers": 3, "n_heads": 4}


@pytest.fixture
def neox(fixtures_dir) -> Path:
    return fixtures_dir / "gpt_neox"


def generator(neox, **more):
    return labml.LayerGenerator(**{**SIZES, "path": neox, **more})


def test_files_are_read_as_they_are_stored(neox):
    pair = ("layer_02-model_00-model_states.pt", "layer_02-model_01-model_states.pt")
    one, two = labml.load_checkpoint_files(pair, path=neox)
    assert one.keys() == two.keys() >= {"attention.dense.bias", "input_layernorm.weight"}
    assert one["attention.query_key_value.weight"].shape == (96, 64)
    weights = torch.load(neox / "global_step10" / pair[1], weights_only=True)
    assert all(torch.equal(two[key], tensor) for key, tensor in weights.items())
    at_the_step = labml.load_checkpoint_files(pair[:1], path=neox / "global_step10")
    assert torch.equal(at_the_step[0]["mlp.dense_h_to_4h.bias"], one["mlp.dense_h_to_4h.bias"])


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('run')",))


def test_nothing_that_a_pickle_brings_along_is_run(tmp_path):
    name = "layer_00-model_00-model_states.pt"
    torch.save({"word_embeddings.weight": torch.ones(2), "more": Bomb()}, tmp_path / name)
    (found,) = labml.load_checkpoint_files((name,), path=tmp_path)
    assert list(found) == ["word_embeddings.weight"]


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*layer_99.*download") as caught:
        labml.load_checkpoint_files(("layer_99-model_00-model_states.pt",), path=tmp_path)
    assert isinstance(caught.value, StorageError)
    with pytest.raises(FileNotFoundError) as caught:
        list(labml.LayerGenerator(path=tmp_path).load())
    assert str(caught.value).count("global_step150000/") == 1


def test_half_a_file_is_no_layer(neox, tmp_path):
    name = "layer_00-model_00-model_states.pt"
    whole = (neox / "global_step10" / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError):
        labml.load_checkpoint_files((name,), path=tmp_path)


def test_layers_come_in_order_with_their_files(neox):
    found = [(type(layer), files) for layer, files in generator(neox).get_layers()]
    transformer = [labml.TransformerLayer] * 3
    assert [kind for kind, _ in found] == [
        labml.Embedding, *transformer, labml.FinalNorm, labml.ReadoutLayer
    ]  # fmt: skip
    assert [files[1] for _, files in found] == [
        f"layer_0{number}-model_01-model_states.pt" for number in (0, 2, 3, 4, 6, 7)
    ]


def test_without_files_the_layers_are_those_of_the_20b_model(tmp_path):
    small = {"n_vocab": 8, "n_hidden": 8, "n_heads": 2}
    made = labml.LayerGenerator(
        **small, n_layers=2, filter_layers={0, 2, 3, 4}, path=tmp_path / "nothing"
    )
    assert made.total_layers == 5
    assert [files for _, files in made.get_layers()] == [
        tuple(f"layer_{number}-model_{part}-model_states.pt" for part in ("00", "01"))
        for number in ("00", "03", "47", "48")
    ]


# As the original's generator chose, observed with n_layers=3: the filter, and what it gave.
FILTERS = [
    (None, ["emb", "0", "1", "2", "norm", "readout"]),
    (set(), []),
    ({0}, ["emb"]),
    ({1, 3}, ["0", "2"]),
    ({4}, ["norm"]),
    ({5, 0}, ["emb", "readout"]),
]


@pytest.mark.parametrize(("wanted", "names"), FILTERS)
def test_the_filter_counts_embedding_layers_norm_and_readout(neox, wanted, names):
    number = {"emb": 0, "0": 2, "1": 3, "2": 4, "norm": 6, "readout": 7}
    given = generator(neox, filter_layers=wanted)
    files = [files[0] for _, files in given.get_layers()]
    assert files == [f"layer_0{number[name]}-model_00-model_states.pt" for name in names]
    assert len(list(given.load())) == len(list(given.merged())) == len(names)


@pytest.mark.parametrize("wrong", [{6}, {-1}, {"0"}])
def test_a_filter_that_no_layer_fits_is_an_error(neox, wrong):
    with pytest.raises(ValueError, match="the indices 0 to 5"):
        generator(neox, filter_layers=wrong)


HF = {
    "emb.weight": "gpt_neox.embed_in.weight",
    "ln.weight": "gpt_neox.final_layer_norm.weight",
    "ln.bias": "gpt_neox.final_layer_norm.bias",
    "linear.weight": "embed_out.weight",
    "attention.output": "attention.dense",
    "attention.qkv_lin": "attention.query_key_value",
    "pre_ln_attn": "input_layernorm",
    "pre_ln_ffn": "post_attention_layernorm",
    "ffn.dense_h_h4": "mlp.dense_h_to_4h",
    "ffn.dense_h4_h": "mlp.dense_4h_to_h",
}


def test_merged_parameters_are_those_of_the_whole_model(neox):
    expected = json.loads((neox / "expected.json").read_text())["tensors"]
    found = {}
    for layer in generator(neox).merged():
        for name, tensor in layer.parameters.items():
            owner, _, last = name.rpartition(".")
            inner = f"gpt_neox.layers.{layer.index - 1}.{HF.get(owner)}.{last}"
            found[HF.get(name, inner)] = tensor
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        digest = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        assert digest == expected[key]["sha256_f32"], key


def test_the_loaded_layers_are_the_model(neox, fixtures_dir):
    model = nn.Sequential(*generator(neox, is_clone_layers=False).load())
    recorded = np.load(fixtures_dir / "hf/gpt_neox/io.npz")
    with torch.no_grad():
        logits = model(torch.from_numpy(recorded["input_ids"]))
    # What is not padding: the original's layers know no mask but the causal one.
    read = torch.from_numpy(recorded["attention_mask"]).bool()
    assert torch.allclose(logits[read], torch.from_numpy(recorded["logits"])[read], atol=2e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_parameters_fit_into_a_module_of_ones_own_by_name(neox):
    (layer,) = generator(neox, filter_layers={2}, dtype=torch.bfloat16).merged()
    module = labml.TransformerLayer(64, 4)
    module.load_state_dict(layer.parameters)
    assert (layer.index, layer.kind) == (2, labml.TransformerLayer)
    (loaded,) = generator(neox, filter_layers={2}, dtype=torch.bfloat16).load()
    assert all(p.dtype == torch.bfloat16 for p in loaded.parameters())
    assert torch.equal(module.attention.output.bias, loaded.attention.output.bias.float())


@pytest.mark.parametrize("partitions", [1, 4])
def test_any_number_of_partitions_is_read(neox, tmp_path, partitions):
    wanted = {0, 1, 4, 5}
    expected = list(generator(neox, filter_layers=wanted).load())
    for layer, number in zip(generator(neox).merged(), (0, 2, 3, 4, 6, 7), strict=True):
        parts = [{} for _ in range(partitions)]
        for name, (key, how) in layer.kind.TABLE.items():
            whole = layer.parameters[name]
            for rank, part in enumerate(parts):
                if how.startswith("dim"):
                    part[key] = whole.chunk(partitions, int(how[-1]))[rank].clone()
                else:
                    part[key] = whole if how == "duplicate" else whole / partitions
        for rank, part in enumerate(parts):
            name = f"layer_{number:02d}-model_{rank:02d}-model_states.pt"
            torch.save(part, tmp_path / name)
    found = list(generator(tmp_path, filter_layers=wanted).load())
    for mine, other in zip(found, expected, strict=True):
        for one, two in zip(mine.parameters(), other.parameters(), strict=True):
            assert torch.allclose(one, two, atol=1e-7)


def test_fewer_layers_than_stored_end_in_the_stored_norm(neox):
    given = generator(neox, n_layers=1)
    assert [files[0][6:8] for _, files in given.get_layers()] == ["00", "02", "06", "07"]
    with pytest.raises(ConfigError, match="44 layers of a model that has 3"):
        list(generator(neox, n_layers=44).get_layers())


def test_a_layer_of_another_size_is_an_error_with_its_name(neox):
    with pytest.raises(labml.WrongShape, match=r"'word_embeddings.weight'.*\[128, 64\].*\[100"):
        list(generator(neox, n_vocab=100).load())


@pytest.mark.parametrize(("heads", "said"), [(8, "inv_freq.*n_heads=8"), (3, "divided among")])
def test_a_number_of_heads_that_does_not_fit_is_an_error(neox, heads, said):
    with pytest.raises(ConfigError, match=said):
        list(generator(neox, n_heads=heads).load())


def test_int8_is_refused_in_words(neox):
    with pytest.raises(ConfigError, match="is_llm_int8=False"):
        generator(neox, is_llm_int8=True)


# ------------------------------------------------------------------ fine-tuning


def test_three_biases_of_each_layer_are_trained_and_kept(neox):
    layers = list(generator(neox, filter_layers={0, 1, 2, 4}).load())
    tuner = labml.FineTuneBiases(layers)
    tuner.set_trainable_params()
    names = [
        f"layer_0{number}.{name}.bias"
        for number in (1, 2)
        for name in ("attention.output", "attention.qkv_lin", "ffn.dense_h_h4")
    ]
    assert list(tuner.get_trainable_params()) == names
    trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in tuner.get_trainable_params().values()}
    kept = {name: tensor + 1 for name, tensor in tuner.state_dict().items()}
    fresh = labml.FineTuneBiases(generator(neox, filter_layers={0, 1, 2, 4}).load())
    fresh.load_state_dict(kept)
    assert all(torch.equal(p, kept[n]) for n, p in fresh.get_trainable_params().items())


def test_a_state_that_does_not_fit_changes_nothing(neox):
    tuner = labml.FineTuneBiases(generator(neox, filter_layers={1}).load())
    before = {name: tensor.clone() for name, tensor in tuner.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    last = list(state)[-1]
    with pytest.raises(AssertionError, match=r"'layer_09\.x', which is not trained"):
        tuner.load_state_dict({**state, "layer_09.x": torch.ones(1)})
    with pytest.raises(labml.WrongShape, match=last):
        tuner.load_state_dict({**state, last: torch.ones(1)})
    del state[last]
    with pytest.raises(KeyError, match=last):
        tuner.load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuner.state_dict().items())


# ------------------------------------------------------------------ where the files are


def test_the_folder_is_the_one_that_labml_would_use(tmp_path, monkeypatch):
    inner = tmp_path / "project" / "scripts"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert labml.get_checkpoints_download_path() == inner / "data/neox/slim_weights"
    (tmp_path / "project" / ".labml.yaml").write_text("web_api: null\n")
    data = tmp_path / "project" / "data"
    assert labml.get_checkpoints_download_path() == data / "neox/slim_weights"
    (data / "neox_fast" / "slim_weights").mkdir(parents=True)
    assert labml.get_checkpoints_download_path() == data / "neox_fast/slim_weights"
    (tmp_path / "project" / ".labml.yaml").write_text("data_path: ../big\n")
    assert labml.get_checkpoints_download_path() == tmp_path / "big/neox/slim_weights"


def test_every_name_has_a_docstring_that_says_what_it_stands_for():
    own = {"DownloadProgress", "Layer", "MissingKey", "PartitionsDiffer"}
    own |= {"UnknownKey", "WrongShape"}
    for name in set(labml.__all__) - own - {"CHECKPOINTS_URL"}:
        assert "labml_nn.neox" in getattr(labml, name).__doc__, name
    assert labml.CHECKPOINTS_URL.endswith("/GPT-NeoX-20B/slim_weights/")
