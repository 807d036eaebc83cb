"""What a mesh and a strategy mean, and models that are divided by them."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.tensor import DTensor

import bioinit
from bioinit import families
from bioinit.backends import module as own
from bioinit.backends import transformers as backend
from bioinit.config import Placement
from bioinit.errors import ConfigError
from bioinit.parallelize import Sharing, decided, divide, replicated, units
from bioinit.targets import describe
from tests.processes import together

TORCH, MEGATRON = False, True
MEANT = [
    (TORCH, 1, None, None, "single"),
    (TORCH, 1, None, {"dp": 1, "tp": 1}, "single"),
    (TORCH, 4, None, None, "ddp {dp: 4}"),
    (TORCH, 4, None, {"dp": 4}, "fsdp2 {dp: 4}"),
    (TORCH, 4, None, (4,), "fsdp2 {dp: 4}"),
    (TORCH, 4, None, {"replicate": 2}, "fsdp2 {replicate: 2, dp: 2}"),
    (TORCH, 4, None, {"tp": 4}, "tp {tp: 4}"),
    (TORCH, 4, None, {"tp": 2, "dp": 2}, "fsdp2+tp {dp: 2, tp: 2}"),
    (TORCH, 4, "fsdp2+tp", {"tp": 2}, "fsdp2+tp {dp: 2, tp: 2}"),
    (TORCH, 8, "fsdp2+tp", (2, 4), "fsdp2+tp {dp: 2, tp: 4}"),
    (TORCH, 8, "fsdp2+tp", (2, 2, 2), "fsdp2+tp {replicate: 2, dp: 2, tp: 2}"),
    (TORCH, 3, "fsdp2", None, "fsdp2 {dp: 3}"),
    (TORCH, 3, "tp", None, "tp {tp: 3}"),
    (MEGATRON, 1, None, None, "single"),
    (MEGATRON, 4, None, {"tp": 2}, "megatron {tp: 2, pp: 1, vpp: 1, ep: 1, cp: 1, dp: 2}"),
    (MEGATRON, 4, None, {"pp": 2, "vpp": 3, "ep": 2},
     "megatron {tp: 1, pp: 2, vpp: 3, ep: 2, cp: 1, dp: 2}"),
]  # fmt: skip
REFUSED = [
    (TORCH, 2, "single", None, "write ddp"),
    (TORCH, 4, None, {"dp": 3}, "{dp: 3} is 3 ranks, and there are 4 processes"),
    (TORCH, 1, None, {"dp": 2, "tp": 2}, "there is one process. Start 4, torchrun"),
    (TORCH, 4, "fsdp2+tp", {"tp": 3}, "3 ranks times the dp that remains"),
    (TORCH, 4, None, {"tp": 2}, "or strategy: fsdp2[+]tp"),
    (TORCH, 4, None, {"replica": 2}, "'replica'.* Closest: 'replicate'"),
    (TORCH, 1, None, {"data": 1}, "Axes are dp, replicate, tp"),
    (TORCH, 4, "fsdp2", {"dp": 2, "tp": 2}, "or write strategy: fsdp2[+]tp or megatron"),
    (TORCH, 4, "ddp", {"replicate": 2, "dp": 2}, "or write strategy: fsdp2 or fsdp2[+]tp"),
    (TORCH, 4, "fsdp2+tp", {"dp": 4}, "needs the axis tp"),
    (TORCH, 4, "fsdp2+tp", None, "needs the axis tp"),
    (TORCH, 4, None, {"tp": 0}, "tp: 0, and an axis has at least one rank"),
    (TORCH, 4, None, (2, 2), "sizes without names, and no strategy"),
    (TORCH, 4, "tp", (2, 2), "2 sizes without names"),
    (TORCH, 2, None, {"pp": 2}, "model.backend=megatron"),
    (TORCH, 2, "megatron", {"tp": 2}, "Set model.backend=megatron"),
    (MEGATRON, 2, "fsdp2", None, "Write strategy: megatron"),
    (MEGATRON, 4, None, (2, 2), "do not say which"),
    (MEGATRON, 4, None, {"tp": 3}, "3 ranks times the dp that remains"),
    (MEGATRON, 4, None, {"vpp": 2}, "Write pp: 2 or more"),
    (MEGATRON, 4, None, {"tp": 2, "ep": 4}, "the 2 ranks of dp and cp, which it does not divide"),
]


@pytest.mark.parametrize(("is_megatron", "size", "strategy", "mesh", "meant"), MEANT)
def test_what_is_left_open_follows_from_the_rest(is_megatron, size, strategy, mesh, meant):
    placement = Placement(strategy=strategy, mesh=mesh)
    assert str(decided(placement, size, "cpu", is_megatron)) == meant


@pytest.mark.parametrize(("is_megatron", "size", "strategy", "mesh", "said"), REFUSED)
def test_a_mesh_that_cannot_be_is_refused_with_its_cure(is_megatron, size, strategy, mesh, said):
    with pytest.raises(ConfigError, match=said):
        decided(Placement(strategy=strategy, mesh=mesh), size, "cpu", is_megatron)


def test_more_processes_than_gpus_is_an_error_unless_they_are_told_to_share_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="4 processes on this host, which has 2"):
        decided(Placement(), 8, "cuda")
    assert decided(Placement(), 8, "cuda:0").device == "cuda:0"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert decided(Placement(), 8, "cuda").strategy == "ddp"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 9)
        self.down = nn.Linear(9, 6)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.read = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.tables = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.write = nn.Linear(6, 11, bias=False)
        self.write.weight = self.read.weight
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, ids):
        x = self.read(ids)
        for block in self.blocks:
            x = block(x)
        return self.write(x @ self.tables[0].weight + self.tables[1].weight[0]) * self.scale


def test_blocks_are_units_and_what_is_left_is_the_roots():
    model = Model()
    assert list(units(model)) == [*reversed(model.blocks), model]


def test_a_block_that_shares_a_parameter_with_the_rest_is_no_unit():
    model = Model()
    model.blocks[1].up.weight = nn.Parameter(torch.ones(9, 6))
    model.tables[0].weight = model.blocks[1].up.weight
    assert list(units(model)) == [model.blocks[2], model.blocks[0], model]
    model.blocks[2].norm.weight = model.blocks[0].norm.weight
    assert list(units(model)) == [model]


def test_what_is_of_another_dtype_is_a_unit_before_the_block_that_it_is_in():
    model = Model()
    apart = ["blocks.2.norm.weight", "blocks.2.norm.bias"]
    found = list(units(model, apart))
    assert found == [model.blocks[2].norm, *reversed(model.blocks), model]


def test_layers_of_a_transformers_model_are_units_even_if_there_is_one():
    names = [type(unit).__name__ for unit in units(built("esm2", num_hidden_layers=1))]
    assert names == ["EsmLayer", "EsmForMaskedLM"]


def meta(model):
    with torch.device("meta"):
        return model()


def test_a_module_of_ones_own_needs_a_function_for_tensor_parallelism():
    with pytest.raises(ConfigError, match=r"how a Model is divided\. Pass .*parallelize=fn"):
        divide(meta(Model), Sharing("tp", ("tp",), (2,)), own.BACKEND, {})


def test_a_parameter_that_fsdp_cannot_divide_is_named():
    def scalar():
        model = Model()
        model.blocks[0].gain = nn.Parameter(torch.tensor(1.0))
        return model

    def turned():
        model = Model()
        model.tables[1].weight = nn.Parameter(torch.ones(6, 7).t())
        return model

    sharing = Sharing("fsdp2", ("dp",), (2,))
    with pytest.raises(ConfigError, match=r"blocks\.0\.gain is a scalar"):
        divide(meta(scalar), sharing, own.BACKEND, {})
    with pytest.raises(ConfigError, match=r"tables\.1\.weight \(7 x 6\) is not contiguous"):
        divide(meta(turned), sharing, own.BACKEND, {})


def test_processes_that_have_not_met_cannot_share():
    with pytest.raises(ConfigError, match=r"fsdp2 \{dp: 2\} needs processes that have met"):
        divide(meta(Model), Sharing("fsdp2", ("dp",), (2,)), own.BACKEND, {})


@pytest.mark.parametrize("sharing", [Sharing("single"), Sharing("ddp", ("dp",), (2,))])
def test_whole_models_stay_as_they_are(sharing):
    model = meta(Model)
    before = dict(model.named_parameters())
    divide(model, sharing, own.BACKEND, {})
    assert type(model) is Model
    assert all(before[key] is parameter for key, parameter in model.named_parameters())


def built(name, **more):
    cls, config = MODELS[name]
    config = copy.deepcopy(config)
    for field, value in more.items():
        setattr(config, field, value)
    return backend.build(lambda: cls(config))


@pytest.mark.parametrize(
    ("name", "ranks", "more", "said"),
    [
        ("llama", 2, {"num_key_value_heads": 1},
         r"layers\.0\.self_attn\.k_proj has 8 rows of 1 heads \(num_key_value_heads\)"),
        ("llama", 3, {}, r"layers\.0\.self_attn\.q_proj has 32 rows of 4 heads .* 3 does not"),
        ("esm2", 3, {}, r"esm\.encoder\.layer\.0\.attention\.self\.query has 32 rows of 4 heads"),
        ("bert", 4, {"intermediate_size": 3},
         r"layer\.0\.intermediate\.dense\.weight has 3 along dim 0, .* 4 ranks of tp"),
        ("mixtral", 2, {"intermediate_size": 1}, r"experts\.down_proj has 1 along dim 2"),
    ],
)  # fmt: skip
def test_what_tp_does_not_divide_is_an_error_that_names_module_dim_and_size(
    name, ranks, more, said
):
    model = built(name, **more)
    before = dict(model.named_parameters())
    mesh = SimpleNamespace(size=lambda: ranks)
    with pytest.raises(ConfigError, match=said) as raised:
        backend.divide(model, mesh, families.load(name).tensor_parallel)
    assert "parallelize=fn" in str(raised.value)
    assert all(before[key] is parameter for key, parameter in model.named_parameters())


def test_an_architecture_without_a_plan_is_an_error_that_says_what_else_there_is():
    with pytest.raises(ConfigError, match=r"no plan .* EsmForMaskedLM .*Write strategy: fsdp2"):
        backend.divide(built("esm2"), SimpleNamespace(size=lambda: 2), {})


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"encoder.layer.*.attention.self.query": "colwize"}, "no such style. Closest: 'colwise'"),
        ({"encoder.layer.*.attention.query": "colwise"}, "matches no module"),
    ],
)
def test_a_plan_that_says_nothing_is_refused(plan, said):
    with pytest.raises(ConfigError, match=said):
        backend.divide(built("esm2"), SimpleNamespace(size=lambda: 2), plan)


# Sizes that 2 does not divide, wherever that can be.
SMALL = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 45,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
MODELS = {
    "esm2": (
        transformers.EsmForMaskedLM,
        transformers.EsmConfig(
            **{**SMALL, "vocab_size": 33},
            mask_token_id=32,
            pad_token_id=1,
            position_embedding_type="rotary",
        ),
    ),
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig(**SMALL)),
    "biobert": (transformers.MegatronBertForMaskedLM, transformers.MegatronBertConfig(**SMALL)),
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
    ),
    "gemma": (
        transformers.GemmaForCausalLM,
        transformers.GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=8),
    ),
    "mixtral": (
        transformers.MixtralForCausalLM,
        # Their grouped kernel wants rows of multiples of 16 bytes.
        transformers.MixtralConfig(
            **SMALL, num_key_value_heads=2, num_local_experts=3, experts_implementation="eager"
        ),
    ),
    "gpt_neox": (
        transformers.GPTNeoXForCausalLM,
        transformers.GPTNeoXConfig(**SMALL, tie_word_embeddings=True),
    ),
}
SHARED = [name for name in MODELS if name not in ("esm2", "llama", "mixtral")]
"""Those whose logits are compared here; test_matrix has the others, from all of their sources."""
IDS = torch.arange(4, 22).reshape(2, 9)
LARGEST = 1e-5


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of every kind with what it makes of ``IDS``."""
    root = tmp_path_factory.mktemp("saved")
    for name in SHARED:
        cls, config = MODELS[name]
        torch.manual_seed(3)
        model = cls(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            torch.save(model(input_ids=IDS).logits, root / f"{name}.pt")
        model.save_pretrained(root / name)
    torch.manual_seed(3)
    model = Model()
    torch.save(model(IDS % 11), root / "own.pt")
    torch.save(model.state_dict(), root / "own_state.pt")
    return root


def divided(name, strategy, mesh):
    """A model on meta, divided; nothing of it may have memory."""
    sharing = decided(
        Placement(strategy=strategy, mesh=mesh), torch.distributed.get_world_size(), "cpu"
    )
    model = built(name)
    divide(model, sharing, backend.BACKEND, families.load(name).tensor_parallel)
    assert all(parameter.is_meta for parameter in model.parameters()), name
    return model, sharing


def cells(root, meshes):
    """How far off the logits of each model are, divided in each of these ways."""
    found = {}
    for name in SHARED:
        wanted = torch.load(root / f"{name}.pt")
        for strategy, mesh in meshes:
            model, _ = divided(name, strategy, mesh)
            bioinit.load_weights(model, root / name)
            with torch.no_grad():
                made = model.eval()(input_ids=IDS).logits
            found[name, strategy, str(mesh)] = (made - wanted).abs().max().item()
    return found


def facts(name, strategy):
    model, _ = divided(name, strategy, None)
    parts = {key: p for key, p in model.named_parameters(remove_duplicate=False)}
    return {
        "tied": model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        "divided": {key for key, p in parts.items() if isinstance(p, DTensor)},
        "kind": backend_kind(model),
    }


def backend_kind(model):
    key = next(iter(model.state_dict()))
    return backend.describe_init(model, key), own.describe_init(model, key)


def holders(name, strategy, mesh):
    """Which ranks hold the same of each parameter, and what this rank holds."""
    model, sharing = divided(name, strategy, mesh)
    found = replicated(model, describe(model), sharing)
    return {key: (target.replicas, target.boxes) for key, target in found.items()}


def own_cell(root):
    model = own.build(Model)
    divide(model, decided(Placement(strategy="fsdp2"), 2, "cpu"), own.BACKEND, {})
    bioinit.load_weights(model, root / "own_state.pt")
    with torch.no_grad():
        return (model(IDS % 11) - torch.load(root / "own.pt")).abs().max().item()


def two(root):
    return {
        "cells": cells(root, [("tp", None), ("fsdp2", None)]),
        "gemma": facts("gemma", "tp"),
        "gpt_neox": facts("gpt_neox", "tp"),
        "fsdp2": facts("bert", "fsdp2"),
        "own": own_cell(root),
        "held": [holders("llama", "tp", None), holders("bert", "fsdp2", None)],
    }


def four(root, meshes):
    held = [
        holders("gpt_neox", *each) for each in (*meshes, ("fsdp2+tp", {"replicate": 2, "tp": 2}))
    ]
    return {"cells": cells(root, meshes), "held": held}


@pytest.fixture(scope="module")
def on_two(saved):
    return together(2, two, saved)


@pytest.mark.dist
def test_models_divided_in_two_compute_what_the_whole_one_does(on_two):
    for each in on_two:
        assert {cell: error for cell, error in each["cells"].items() if error > LARGEST} == {}
        assert len(each["cells"]) == 2 * len(SHARED)


@pytest.mark.dist
def test_a_module_of_ones_own_is_divided_by_fsdp(on_two):
    assert all(each["own"] <= LARGEST for each in on_two)


@pytest.mark.dist
def test_tied_parameters_stay_tied_and_are_divided_where_the_plan_divides_both(on_two):
    for each in on_two:
        assert each["gemma"]["tied"] and each["gpt_neox"]["tied"] and each["fsdp2"]["tied"]
        assert "lm_head.weight" in each["gemma"]["divided"]
        assert "lm_head.weight" not in each["gpt_neox"]["divided"]
        assert any(key.endswith("query_key_value.weight") for key in each["gpt_neox"]["divided"])


@pytest.mark.dist
def test_rules_of_first_values_are_named_as_in_one_process(on_two):
    model = built("bert")
    assert {each["fsdp2"]["kind"] for each in on_two} == {backend_kind(model)}


def disagreeing(each_rank):
    """Where ranks that are said to hold the same do not, or those that do are not named."""
    for rank, mine in enumerate(each_rank):
        for key, (ranks, boxes) in mine.items():
            same = tuple(other for other, theirs in enumerate(each_rank) if theirs[key][1] == boxes)
            if (ranks or (rank,)) != same:
                yield rank, key, ranks, same


@pytest.fixture(scope="module")
def on_four(saved):
    return together(4, four, saved, [("fsdp2+tp", {"tp": 2}), ("fsdp2", {"replicate": 2})])


@pytest.mark.dist
def test_models_divided_in_four_compute_what_the_whole_one_does(on_four):
    for each in on_four:
        assert {cell: error for cell, error in each["cells"].items() if error > LARGEST} == {}
        assert len(each["cells"]) == 2 * len(SHARED)


@pytest.mark.dist
def test_ranks_that_hold_the_same_are_known(on_two, on_four):
    for ranks in (on_two, on_four):
        for each_rank in zip(*(each["held"] for each in ranks), strict=True):
            assert list(disagreeing(each_rank)) == []
