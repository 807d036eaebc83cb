"""Plans of divided targets: the claims of one process, and copies of what lies here alone."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bioinit import families
from bioinit.config import InitPolicy
from bioinit.errors import ConfigError
from bioinit.formats import open_weights
from bioinit.layout import numel, row_major
from bioinit.load import execute
from bioinit.load.transfer import Job, Transfer
from bioinit.mapping import Conversion, Mapping, Names
from bioinit.plan import Model, plan
from bioinit.rules import Each, Narrow, Part, Permute, Rule, Unflatten, rename
from bioinit.shards import Mesh, Split, boxes
from bioinit.storage import Folder
from bioinit.targets import Located, Target, describe

CPU = torch.device("cpu")
IDENTITY = Names(Mapping.identity(), Mapping.identity())

# Memory holds q, k and v of two groups of heads in one tensor, and the experts of a layer.
MEMORY = Mapping(
    [
        Rule(
            "qkv",
            (
                Part("q", (Unflatten(0, (2, 4, 3)), Narrow(1, 0, 2))),
                Part("k", (Unflatten(0, (2, 4, 3)), Narrow(1, 2, 1))),
                Part("v", (Unflatten(0, (2, 4, 3)), Narrow(1, 3, 1))),
            ),
        ),
        Rule("experts", (Part("e.*", (Each(0, 0), Permute((1, 0)))),)),
        Rule("vocab", (Part("vocab", (Narrow(0, 0, 5),)),), fill=True),
        rename("**", "**"),
    ]
)
DISK = Mapping(
    [
        Rule("q", (Part("q", (Unflatten(0, (2, 2, 3)),)),)),
        Rule("k", (Part("k", (Unflatten(0, (2, 1, 3)),)),)),
        Rule("v", (Part("v", (Unflatten(0, (2, 1, 3)),)),)),
        rename("**", "**"),
    ]
)
SHAPES = {"qkv": (24, 5), "experts": (3, 4, 7), "vocab": (8, 5), "norm": (5,)}
HELD = {"q": (12, 5), "k": (6, 5), "v": (6, 5), "vocab": (5, 5), "norm": (5,)}
HELD |= {f"e.{number}": (7, 4) for number in range(3)}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("divided")
    torch.manual_seed(0)
    save_file({k: torch.randn(s) for k, s in HELD.items()}, folder / "model.safetensors")
    return open_weights(Folder.at(folder))[1]


def decided(contents, targets, names, **policy):
    side = Model({t.key: t for t in targets}, lambda key: f"init of {key}")
    return plan(side, contents.tensors, names, init=InitPolicy(**policy), dtype="module")


def target(key, shape, held):
    return Target(key, shape, torch.float32, held, False, True, None)


def divided(key, shape, mesh, placements, strides=None):
    """A target as a rank of ``mesh`` describes it, and its memory, whose elements are all -1."""
    held = list(shape)
    for axis, split in enumerate(placements):
        if split is not None:
            size = -(-held[split.dim] // mesh.sizes[axis])
            start = min(held[split.dim], size * mesh.coordinate[axis])
            held[split.dim] = min(held[split.dim], start + size) - start
    strides = row_major(tuple(held)) if strides is None else strides
    found = boxes(key, shape, mesh, placements, tuple(held), strides)
    return target(key, shape, found), torch.full(held, -1.0)


def filled(contents, planned, memory):
    transfer = Transfer(contents.files, 1, CPU)
    if planned.padded:
        memory.zero_()
    transfer.move([Job(copy, memory) for copy in planned.copies])
    return transfer


WHOLE = {
    key: target(key, s, boxes(key, s, Mesh((), (), (0,)), (), s, row_major(s)))
    for key, s in SHAPES.items()
}
DIVIDED = [
    ((2,), (Split(0),)),
    ((5,), (Split(0),)),
    ((2, 2), (Split(0), Split(1))),
    ((3,), (Split(1),)),
    ((2, 2), (None, Split(0))),
    ((2, 2, 2), (Split(1), Split(0), Split(0))),
    ((30,), (Split(0),)),
]


@pytest.mark.parametrize(("sizes", "placements"), DIVIDED)
@pytest.mark.parametrize("key", ["qkv", "experts", "vocab"])
def test_each_rank_copies_its_part_through_any_rule_and_claims_the_whole(
    stored, key, sizes, placements
):
    names = Names(DISK, MEMORY)
    whole = decided(stored, [WHOLE[key]], names, on_unused="report")
    assert not whole.problems
    wanted = torch.full(SHAPES[key], -1.0)
    filled(stored, whole.targets[key], wanted)
    assert not (wanted == -1).any()
    size = math.prod(sizes)
    for rank in range(size):
        coordinate = tuple(map(int, np.unravel_index(rank, sizes)))
        part, memory = divided(
            key, SHAPES[key], Mesh(sizes, coordinate, tuple(range(size))), placements
        )
        found = decided(stored, [part], names, on_unused="report")
        assert found.tensors == whole.tensors
        assert found.unused == whole.unused
        assert found.memory_parameters == memory.nbytes
        planned = found.targets[key]
        filled(stored, planned, memory)
        assert sum(copy.bytes for copy in planned.copies) <= memory.nbytes
        for offsets, sizes_here, start, strides in part.boxes:
            region = tuple(slice(o, o + s) for o, s in zip(offsets, sizes_here, strict=True))
            assert torch.equal(memory.as_strided(sizes_here, strides, start), wanted[region])
        if not part.boxes:
            assert planned.copies == () and found.bytes_to_read == 0


def test_only_a_rank_that_holds_padding_fills_it_with_zeros(stored):
    names = Names(DISK, MEMORY)
    padded = []
    for rank in range(4):
        part, _ = divided("vocab", (8, 5), Mesh((4,), (rank,), (0, 1, 2, 3)), (Split(0),))
        found = decided(stored, [part], names, on_unused="report")
        assert "15 elements of padding are zero" in found.tensors[0].rule
        padded.append(found.targets["vocab"].padded)
    assert padded == [False, False, True, True]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_what_is_missing_or_misfits_is_so_on_every_rank(stored, rank):
    mesh = Mesh((3,), (rank,), (0, 1, 2))
    names = Names(DISK, MEMORY)
    for key, shape in (("norm", (7,)), ("absent", (2, 3))):
        alone = decided(
            stored,
            [
                WHOLE["norm"]._replace(
                    key=key,
                    shape=shape,
                    boxes=boxes(key, shape, Mesh((), (), (0,)), (), shape, row_major(shape)),
                )
            ],
            names,
        )
        part, _ = divided(key, shape, mesh, (Split(0),))
        here = decided(stored, [part], names)
        assert here.problems == alone.problems
        assert here.tensors == alone.tensors
        assert here.problems[0].key == key


def test_further_stored_copies_are_compared_where_they_lie(tmp_path):
    state = {"a": torch.arange(12.0).view(6, 2), "b": torch.arange(12.0).view(6, 2)}
    save_file(state, tmp_path / "model.safetensors")
    _, contents = open_weights(Folder.at(tmp_path))
    for rank in range(4):
        part, memory = divided("a", (6, 2), Mesh((4,), (rank,), (0, 1, 2, 3)), (Split(0),))
        tied = part._replace(key="b", tied_to="a")
        planned = decided(contents, [part, tied], IDENTITY).targets["a"]
        transfer = filled(contents, planned, memory)
        assert [name for name, _ in planned.equal] == (["b"] if memory.numel() else [])
        for _, copies in planned.equal:
            assert transfer.same([Job(copy, memory) for copy in copies])
            memory[0, 0] += 1
            assert not transfer.same([Job(copy, memory) for copy in copies])


class Stage(nn.Module):
    """What the second of two stages has: it counts its layers from 0, and half of their rows."""

    def __init__(self, device) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 3, device=device) for _ in range(2)])
        self.norm = nn.LayerNorm(4, device=device)


def located(first):
    rows = boxes("w", (6, 4), Mesh((2,), (1,), (0, 1)), (Split(0),), (3, 4), (4, 1))
    found = {}
    for number in range(2):
        found[f"layers.{number}.weight"] = Located(
            f"layers.{first + number}.weight", (6, 4), rows, (1, 3)
        )
        found[f"layers.{number}.bias"] = Located(
            f"layers.{first + number}.bias",
            (6,),
            (rows[0]._replace(offsets=(3,), sizes=(3,), strides=(1,)),),
            (1, 3),
        )
    return found


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layered")
    torch.manual_seed(0)
    state = {"norm.weight": torch.randn(4), "norm.bias": torch.randn(4)}
    for number in range(4):
        state |= {f"layers.{number}.weight": torch.randn(6, 4)}
        state |= {f"layers.{number}.bias": torch.randn(6)}
    save_file(state, folder / "model.safetensors")
    return state, open_weights(Folder.at(folder))[1]


def carry_out(module, where, contents, names=IDENTITY, **policy):
    found = describe(module, where)
    backend, _ = families.of_module(module)
    policy = InitPolicy(on_unused="report", **policy)
    side = Model(found, lambda key: f"init of {key}")
    made = plan(side, contents.tensors, names, init=policy, dtype="module")
    assert not made.problems
    return execute(
        made,
        module,
        contents.files,
        contents.tensors,
        backend=backend,
        make=lambda: module,
        init=policy,
        device=CPU,
    )


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_parts_are_filled_under_the_names_that_the_whole_model_has_for_them(layered, device):
    state, contents = layered
    module = Stage(device)
    report = carry_out(module, located(2), contents, frozen=("layers.3.*",), check_finite=True)
    for number in range(2):
        linear = module.layers[number]
        assert torch.equal(linear.weight, state[f"layers.{number + 2}.weight"][3:])
        assert torch.equal(linear.bias, state[f"layers.{number + 2}.bias"][3:])
        assert linear.weight.requires_grad == (number == 0)
    assert torch.equal(module.norm.weight, state["norm.weight"])
    assert [c.key for c in report.claims][:2] == ["layers.2.weight", "layers.2.bias"]
    assert report.claims[0].shape == (6, 4)
    assert report.parameters == 2 * (24 + 6) + 8
    target = describe(module, located(2))["layers.3.weight"]
    assert (target.live, target.slot, target.replicas) == (
        "layers.1.weight",
        "layers.1.weight",
        (1, 3),
    )


def test_a_failed_load_names_parts_as_the_whole_model_does(layered, tmp_path):
    state, _ = layered
    broken = {**state, "layers.3.weight": torch.full((6, 4), math.nan)}
    save_file(broken, tmp_path / "model.safetensors")
    _, contents = open_weights(Folder.at(tmp_path))
    with pytest.raises(Exception, match=r"layers\.3\.weight.*NaN") as caught:
        carry_out(Stage("cpu"), located(2), contents, check_finite=True)
    assert any("layers.2.weight" in note for note in caught.value.__notes__)


def test_rows_of_a_part_that_lie_in_no_box_are_zero(layered):
    state, contents = layered
    module = nn.Module()
    module.rows = nn.Parameter(torch.full((5, 4), 9.0))
    [box] = boxes("w", (6, 4), Mesh((2,), (1,), (0, 1)), (Split(0),), (3, 4), (4, 1))
    carry_out(module, {"rows": Located("layers.0.weight", (6, 4), (box,))}, contents)
    assert torch.equal(module.rows[:3], state["layers.0.weight"][3:])
    assert not module.rows[3:].any()


def test_what_a_conversion_makes_is_divided_after_it_is_made(layered):
    state, contents = layered
    module = nn.Module()
    module.turned = nn.Parameter(torch.empty(2, 6))
    made = Conversion(
        ("turned",), ("layers.1.weight",), lambda given: {"turned": given[0].t() + 1}, "turn"
    )
    [box] = boxes("turned", (4, 6), Mesh((2,), (1,), (0, 1)), (Split(0),), (2, 6), (6, 1))
    names = IDENTITY._replace(conversions=(made,))
    carry_out(module, {"turned": Located("turned", (4, 6), (box,))}, contents, names)
    assert torch.equal(module.turned, state["layers.1.weight"].t()[2:] + 1)


def test_two_tensors_cannot_be_one_of_the_whole_model():
    where = {f"layers.{number}.weight": Located("w", (3, 4), ()) for number in range(2)}
    with pytest.raises(ConfigError, match=r"layers\.0\.weight and layers\.1\.weight .* w of"):
        describe(Stage("cpu"), where)


def test_held_counts_what_lies_here():
    part, memory = divided("w", (7, 3), Mesh((2,), (1,), (0, 1)), (Split(0),))
    assert part.held == memory.numel() == numel((3, 3))
    assert not part.is_whole and WHOLE["norm"].is_whole
