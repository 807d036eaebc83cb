"""First values of divided models: those of one process, bit for bit, however many ranks there are.

One process starts each model whole and keeps what it holds; ranks start it divided, each in turn.
"""

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bioinit import ranks
from bioinit.backends.module import BACKEND as OWN
from bioinit.backends.protocol import Backend
from bioinit.config import InitPolicy
from bioinit.errors import PlanError
from bioinit.families import open_checkpoint
from bioinit.load import execute, reset_parameters, twin
from bioinit.mapping import Mapping, Names
from bioinit.plan import Model, plan
from bioinit.ranks import ALONE
from bioinit.targets import describe, is_divided, local
from tests.processes import together

pytestmark = pytest.mark.dist
IDENTITY = Names(Mapping.identity(), Mapping.identity())


@dataclass
class Start:
    """A model, what is stored of it, and how it is divided by ``(module, mesh)``."""

    make: Callable[[], nn.Module]
    backend: Backend
    stored: dict[str, torch.Tensor] = field(default_factory=dict)
    policy: dict = field(default_factory=lambda: {"on_missing": "init", "seed": 5})
    vocab: frozenset[str] = frozenset()
    dtype: object = "module"
    again: bool = True

    def carry_out(self, divide=None, world=ALONE) -> nn.Module:
        module = self.backend.build(self.make)
        if divide is not None:
            divide(module)
        make = self.make if self.again else lambda: module
        with tempfile.TemporaryDirectory() as folder:
            save_file(self.stored, Path(folder) / "model.safetensors")
            with open_checkpoint(folder) as checkpoint:
                targets = describe(module)
                planned = plan(
                    Model(targets, lambda key: "its rule", vocab_keys=self.vocab),
                    checkpoint.tensors,
                    IDENTITY,
                    init=InitPolicy(**self.policy),
                    dtype=self.dtype,
                )
                assert not planned.problems
                state = torch.get_rng_state()
                self.report = execute(
                    planned,
                    module,
                    checkpoint.files,
                    checkpoint.tensors,
                    backend=self.backend,
                    make=make,
                    init=InitPolicy(**self.policy),
                    device=torch.device("cpu"),
                    world=world,
                    make_whole=(lambda: self.backend.build(self.make)) if self.again else None,
                )
        assert torch.equal(state, torch.get_rng_state())
        return module


def alone(start: Start) -> dict:
    """What the model holds if one process starts it, and how many elements that are."""
    module = start.carry_out()
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        "held": {key: tensor.detach() for key, tensor in held.items()},
        "counts": (start.report.parameters, start.report.trainable),
    }


def compare(name: str, start: Start, said: dict, divide, world) -> None:
    divided = start.carry_out(divide, world)
    assert (start.report.parameters, start.report.trainable) == said["counts"], name
    expected = said["held"]
    got = {**dict(divided.named_parameters()), **dict(divided.named_buffers())}
    targets = describe(divided)
    assert got.keys() == expected.keys()
    assert any(map(is_divided, got.values())), f"{name}: not divided"
    for key, tensor in got.items():
        memory = local(tensor.detach())
        assert memory.dtype == expected[key].dtype, (name, key)
        for box in targets[key].boxes:
            start = memory.storage_offset() + box.start
            ends = map(sum, zip(box.offsets, box.sizes, strict=True))
            there = expected[key][tuple(map(slice, box.offsets, ends))]
            assert torch.equal(memory.as_strided(box.sizes, box.strides, start), there), (name, key)


# -- models


class Parent(nn.Module):
    """Initializes its children and itself at the end, some of it by way of tensors without name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.randn(7, 3))
        self.register_buffer("steps", torch.arange(5))
        self.apply(self._reset)
        nn.init.orthogonal_(self.body[1].weight)

    def _reset(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.1)
            nn.init.orthogonal_(module.weight)


class Forgetful(nn.Module):
    """Never writes one of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.left = nn.Parameter(torch.empty(8, 6))


def convention() -> Backend:
    from dataclasses import replace

    return replace(OWN, initialize=reset_parameters)


def esm2() -> nn.Module:
    from transformers import EsmConfig, EsmForSequenceClassification

    config = EsmConfig(
        vocab_size=33,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        position_embedding_type="rotary",
        pad_token_id=1,
        mask_token_id=32,
        num_labels=5,
    )
    return EsmForSequenceClassification(config)


def llama(tied: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def starts() -> dict[str, Start]:
    from bioinit.backends.transformers import BACKEND as TRANSFORMERS

    torch.manual_seed(11)
    torso = {
        key: torch.randn(value.shape)
        for key, value in esm2().state_dict().items()
        if key.startswith("esm.") and value.is_floating_point()
    }
    rows = torch.randn(7, 6)
    return {
        "esm2 with a new head": Start(esm2, TRANSFORMERS, torso),
        "esm2 without its constructor": Start(esm2, TRANSFORMERS, torso, again=False),
        "esm2 in half": Start(esm2, TRANSFORMERS, torso, dtype=torch.bfloat16),
        "llama from nothing": Start(lambda: llama(False), TRANSFORMERS),
        "llama from nothing, tied": Start(lambda: llama(True), TRANSFORMERS),
        "a module of one's own": Start(Parent, OWN),
        "one of its own, mostly loaded": Start(
            Parent, OWN, {f"body.{i}.weight": torch.randn(6, 6) for i in (0, 2)}
        ),
        "by reset_parameters, without the constructor": Start(
            lambda: nn.Sequential(nn.Linear(5, 9), nn.LayerNorm(9), nn.Linear(9, 4)),
            convention(),
            {"0.weight": torch.randn(9, 5)},
            again=False,
        ),
        "rows added to what is stored": Start(
            Parent,
            OWN,
            {"embed.weight": rows},
            {"on_missing": "init", "on_mismatch": "resize", "seed": 9},
            frozenset({"embed.weight"}),
        ),
    }


# -- how they are divided


def by_fsdp2(mesh):
    from torch.distributed.fsdp import fully_shard

    def divide(module: nn.Module) -> None:
        # What is tied belongs to one unit, which is the whole.
        names = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
        for inner in list(module.modules()):
            if isinstance(inner, nn.Linear) and names[id(inner.weight)] == 1:
                fully_shard(inner, mesh=mesh)
        fully_shard(module, mesh=mesh)

    return divide


def by_tensor(mesh):
    """Every matrix in turns by rows and by columns; what is left stays with every rank."""
    from torch.distributed.tensor import Shard, distribute_tensor

    def divide(module: nn.Module) -> None:
        shared: dict[int, nn.Parameter] = {}
        for inner in module.modules():
            for name, parameter in list(inner._parameters.items()):
                if parameter is None or parameter.dim() < 2:
                    continue
                if id(parameter) not in shared:
                    cut = Shard(len(shared) % 2)
                    parts = distribute_tensor(parameter.detach(), mesh, [cut])
                    shared[id(parameter)] = nn.Parameter(parts)
                inner._parameters[name] = shared[id(parameter)]

    return divide


def four_ranks(folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    twice = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    four = init_device_mesh("cpu", (4,))
    expected = torch.load(Path(folder) / "expected.pt")

    def by_both(module: nn.Module) -> None:
        by_tensor(twice["tp"])(module)
        by_fsdp2(twice["dp"])(module)

    with ranks.together() as world:
        for name, start in starts().items():
            compare(f"{name}, tp", start, expected[name], by_tensor(four), world)
            compare(f"{name}, fsdp2 and tp", start, expected[name], by_both, world)
            # A module at a time, however small all of them are.
            twin.WHOLE_BYTES, was = 1, twin.WHOLE_BYTES
            compare(f"{name}, fsdp2", start, expected[name], by_fsdp2(four), world)
            twin.WHOLE_BYTES = was
        for name in ("esm2 with a new head", "a module of one's own"):
            compare(f"{name}, hsdp", starts()[name], expected[name], by_fsdp2(twice), world)
    _is_told_what_nobody_wrote(four)


def _is_told_what_nobody_wrote(mesh) -> None:
    with pytest.raises(PlanError, match="nothing gives 'left'"), ranks.together() as world:
        Start(Forgetful, OWN).carry_out(by_fsdp2(mesh), world)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """A folder with what every model holds that one process starts."""
    folder = tmp_path_factory.mktemp("alone")
    torch.save({name: alone(start) for name, start in starts().items()}, folder / "expected.pt")
    return str(folder)


def test_new_values_of_divided_models_are_those_of_one_process(expected):
    together(4, four_ranks, expected)


def test_whole_tensors_lie_side_by_side_up_to_a_limit_or_by_one_module():
    new = {
        f"{module}.{name}": twin.New((size,), torch.uint8)
        for module, size in (("a", 2**20), ("b", twin.WHOLE_BYTES), ("c", 1), ("d", 1))
        for name in ("bias", "weight")
    }
    batches = list(twin._batches(new, twin.WHOLE_BYTES))
    assert [sorted({key[0] for key in batch}) for batch in batches] == [["a"], ["b"], ["c", "d"]]
    assert [key for batch in batches for key in batch] == list(new)
