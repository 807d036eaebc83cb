"""Models of megatron-core that are divided among processes: parts, first values, loading."""

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bioinit.backends import megatron
from bioinit.backends.megatron.world import sizes
from bioinit.load.initial import Watching, own_random_state
from tests.megatron_shares import differing
from tests.processes import together

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(
        importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LLAMA = {
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "gated_linear_unit": True,
    "activation_func": "silu",
    "init_method_std": 0.1,
}
BIASED = {**LLAMA, "add_bias_linear": True}
EXPERTS = {**LLAMA, "num_moe_experts": 4, "moe_router_topk": 2}
PLAIN = {**LLAMA, "normalization": "LayerNorm", "gated_linear_unit": False}
SIZES = {
    "num_layers": 4,
    "hidden_size": 12,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 4,
    "layernorm_epsilon": 1e-5,
    "vocab_size": 21,
    "seq_length": 32,
}

Make = Callable[[], nn.Module]


def gpt(fields: Mapping[str, Any], *, tied: bool = False, **sizes: Any) -> Make:
    ours = SimpleNamespace(**(SIZES | sizes), share_embeddings_and_output_weights=tied)
    return lambda: megatron.gpt(ours, fields, divisor=3, position_embedding_type="rope")


def bert(*, tied: bool) -> Make:
    ours = SimpleNamespace(**SIZES, share_embeddings_and_output_weights=tied)
    fields = {"activation_func": "gelu", "init_method_std": 0.1}
    return lambda: megatron.bert(ours, fields, divisor=3, num_tokentypes=2, add_binary_head=True)


MODELS = {
    "llama": gpt(LLAMA),
    "tied": gpt(LLAMA, tied=True),
    "biased": gpt(BIASED),
    "plain": gpt(PLAIN),
    "one group": gpt(LLAMA, num_query_groups=1),
    "in sequence": lambda: gpt(LLAMA | {"sequence_parallel": sizes()["tp"] > 1})(),
    "mixtral": gpt(EXPERTS),
    "bert": bert(tied=False),
    "tied bert": bert(tied=True),
}
"""The vocabulary is padded to 21 rows in one process, and to 24 where two have a part of it."""

DENSE = tuple(name for name in MODELS if name != "mixtral")
TWO: tuple[tuple[dict[str, int], tuple[str, ...]], ...] = (
    ({"tp": 2}, (*DENSE, "mixtral")),
    ({"pp": 2}, (*DENSE, "mixtral")),
    ({"pp": 2, "vpp": 2}, (*DENSE, "mixtral")),
    ({"ep": 2}, ("mixtral",)),
    ({"dp": 2}, ("llama",)),
)
FOUR: tuple[tuple[dict[str, int], tuple[str, ...]], ...] = (
    ({"tp": 2, "pp": 2}, (*DENSE, "mixtral")),
    ({"tp": 2, "pp": 2, "vpp": 2}, ("llama", "tied", "bert")),
    ({"tp": 2, "ep": 2}, ("mixtral",)),
    ({"pp": 2, "ep": 2}, ("mixtral",)),
    ({"tp": 4}, ("one group", "plain")),
)


# --- what a rank is expected to hold, sliced without asking what is tested ---


def with_memory(model: nn.Module) -> nn.Module:
    """As ``load`` would do it: memory for everything, attributes kept; left-over bytes are 7."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                real = nn.Parameter(torch.full(parameter.shape, 7.0))
                vars(real).update(vars(parameter))
                module._parameters[name] = real
    return model


def first_values(make: Make) -> dict[str, torch.Tensor]:
    """Every parameter of what this process has, after Megatron's initializer, by its name here."""
    model = with_memory(megatron.BACKEND.build(make))
    live = {key: p.detach() for key, p in model.named_parameters()}
    named = {key: part.key for key, part in megatron.located(model).items()}
    watch = Watching(live, frozenset(), 0, named.__getitem__)
    with torch.no_grad(), own_random_state(torch.device("cpu")), watch:
        assert not megatron.BACKEND.initialize(model, make, frozenset(), watch)
    assert watch.written == set(live)
    return live


# --- the world of one process, which says what is expected ---


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file with the first values of every model in one process."""
    path = tmp_path_factory.mktemp("alone") / "values.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({name: first_values(make) for name, make in MODELS.items()}, path)
    yield path
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def of_one(model: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """What ``located`` says that is not so, for a model that holds its share of ``values``."""
    rank = torch.distributed.get_rank()
    held = dict(model.named_parameters())
    parts = megatron.located(model)
    if set(parts) != set(held):
        yield f"{set(parts) ^ set(held)} are not parameters here"
    for live, part in parts.items():
        memory = held[live].detach()
        whole = values[part.key]
        grown = whole.new_zeros(part.shape)
        grown[tuple(map(slice, whole.shape))] = whole
        if sum(math.prod(box.sizes) for box in part.boxes) != memory.numel():
            yield f"{live}: {part} do not fill it"
        for box in part.boxes:
            here = memory.as_strided(box.sizes, box.strides, memory.storage_offset() + box.start)
            ends = zip(box.offsets, box.sizes, strict=True)
            there = grown[tuple(slice(o, o + s) for o, s in ends)]
            outside = box.offsets[0] + torch.arange(box.sizes[0]) >= whole.shape[0]
            if not torch.equal(here[~outside], there[~outside]):
                yield f"{live}: {box} is not there in {part.key}"
        if rank not in part.replicas or list(part.replicas) != sorted({*part.replicas}):
            yield f"{live}: rank {rank} has it, and {part.replicas} are said to"


def cells(meshes: Any, path: str) -> list[dict[str, tuple[Any, ...]]]:
    """Every cell of ``meshes`` in this rank; of each, who is said to hold what."""
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state

    expected = torch.load(path)
    told = []
    for mesh, names in meshes:
        megatron.require_world(mesh)
        for name in names:
            live = first_values(MODELS[name])
            tied, gated = "tied" in name, "bert" not in name and name != "plain"
            wrong = differing(live, expected[name], tied=tied, gated=gated)
            assert not wrong, (mesh, name, wrong)
            model = with_memory(megatron.BACKEND.build(MODELS[name]))
            on_meta = megatron.located(megatron.BACKEND.build(MODELS[name]))
            assert on_meta == megatron.located(model), (mesh, name)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    parameter.copy_(live[key])
            wrong = list(of_one(model, expected[name]))
            assert not wrong, (mesh, name, wrong)
            told.append({p.key: (p.shape, p.boxes, p.replicas) for p in on_meta.values()})
        parallel_state.destroy_model_parallel()
    return told


def disagreeing(told: list[list[dict[str, tuple[Any, ...]]]]) -> list[str]:
    """Where ranks that are said to hold the same boxes do not all say so."""
    found = []
    for number, cell in enumerate(zip(*told, strict=True)):
        for rank, parts in enumerate(cell):
            for key, (shape, boxes, replicas) in parts.items():
                if any(cell[r].get(key) != (shape, boxes, replicas) for r in replicas):
                    found.append(f"cell {number}, rank {rank}: {key} {replicas}")
    return found


def test_two_processes_hold_what_one_would(alone):
    assert not disagreeing(together(2, cells, TWO, str(alone)))


def test_four_processes_hold_what_one_would(alone):
    assert not disagreeing(together(4, cells, FOUR, str(alone)))
