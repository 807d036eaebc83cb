"""Any stretch of a planned tensor, made for itself, is that stretch of the whole."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import bioinit
from bioinit.config import InitPolicy
from bioinit.errors import PlanError
from bioinit.formats.protocol import Outgoing
from bioinit.layout import Box, numel
from bioinit.load.stream import Stream
from bioinit.mapping import Conversion, Names
from bioinit.mapping import Mapping as Table
from bioinit.plan import Model, plan
from bioinit.rules import Narrow, Part, Permute, Rule, Unflatten, rename, stacked
from bioinit.targets import Target

LAYERS, GROUPS, EACH, CHANNELS, HIDDEN = 3, 2, 2, 5, 7
Q = (GROUPS, EACH, CHANNELS, HIDDEN)
K = (GROUPS, 1, CHANNELS, HIDDEN)
FUSED = Unflatten(0, (GROUPS, EACH + 2, CHANNELS))
SEPARATE = Table(
    [
        Rule("l.*.q", (Part("l.*.q", (Unflatten(0, (GROUPS, EACH, CHANNELS)),)),)),
        Rule("l.*.k", (Part("l.*.k", (Unflatten(0, (GROUPS, 1, CHANNELS)),)),)),
        Rule("l.*.v", (Part("l.*.v", (Unflatten(0, (GROUPS, 1, CHANNELS)),)),)),
        rename("**", "**"),
    ]
)
STACKED = Table(
    [
        stacked(
            Rule(
                "l.*.qkv",
                (
                    Part("l.*.q", (FUSED, Narrow(1, 0, EACH))),
                    Part("l.*.k", (FUSED, Narrow(1, EACH, 1))),
                    Part("l.*.v", (FUSED, Narrow(1, EACH + 1, 1))),
                ),
            )
        ),
        Rule("padded", (Part("words", (Narrow(0, 0, 9, 16),)),), fill=True),
        Rule("turned", (Part("square", (Permute((1, 0)),)),)),
        Rule("around_one", (Part("norm", (), -1.0),)),
        rename("**", "**"),
    ]
)


def stored() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    rows = GROUPS * CHANNELS
    found = {f"l.{i}.q": torch.randn(rows * EACH, HIDDEN) for i in range(LAYERS)}
    found |= {f"l.{i}.{name}": torch.randn(rows, HIDDEN) for i in range(LAYERS) for name in "kv"}
    return {
        **found,
        "words": torch.randn(9, 4),
        "square": torch.randn(6, 5),
        "norm": torch.randn(HIDDEN),
        "count": torch.tensor(12),
        "empty": torch.empty(0, 3),
    }


def wanted(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    layers = []
    for i in range(LAYERS):
        q = state[f"l.{i}.q"].view(Q)
        k, v = (state[f"l.{i}.{name}"].view(K) for name in "kv")
        layers.append(torch.cat([q, k, v], 1).reshape(-1, HIDDEN))
    return {
        "l.qkv": torch.stack(layers),
        "padded": torch.cat([state["words"], torch.zeros(7, 4)]),
        "turned": state["square"].T.contiguous(),
        "around_one": state["norm"] + 1,
        "count": state["count"],
        "empty": state["empty"],
    }


def outgoing(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    targets: Mapping[str, torch.Tensor],
    memory: Table = STACKED,
    conversions: Sequence[Conversion] = (),
    dtype: torch.dtype | str = "stored",
) -> list[Outgoing]:
    save_file(dict(state), folder / "model.safetensors")
    checkpoint = bioinit.open_checkpoint(folder / "model.safetensors")
    described = {
        key: Target(
            key,
            tuple(tensor.shape),
            tensor.dtype,
            (Box.contiguous(tuple(tensor.shape)),),
            False,
            True,
            None,
        )
        for key, tensor in targets.items()
    }
    planned = plan(
        Model(described, str),
        checkpoint.tensors,
        Names(SEPARATE, memory, tuple(conversions)),
        init=InitPolicy(),
        dtype=dtype,
    )
    assert not planned.problems, planned.problems
    return Stream(planned, checkpoint.files, checkpoint.tensors).outgoing()


def whole(tensor: Outgoing, cuts: Sequence[int]) -> torch.Tensor:
    """The tensor as it comes out in pieces that end at ``cuts``."""
    ends = sorted({end for end in (*cuts, numel(tensor.shape)) if 0 < end <= numel(tensor.shape)})
    parts, first = [], 0
    for end in ends:
        memory = torch.full((end - first,), 99).to(tensor.dtype)
        tensor.fill(first, memory)
        parts.append(memory)
        first = end
    return torch.cat(parts).view(tensor.shape) if parts else torch.empty(tensor.shape)


@pytest.mark.parametrize("seed", range(12))
def test_pieces_cut_anywhere_make_the_whole(tmp_path: Path, seed: int):
    rng = random.Random(seed)
    state = stored()
    found = outgoing(tmp_path, state, wanted(state))
    for tensor in found:
        count = numel(tensor.shape)
        cuts = [rng.randrange(count + 1) for _ in range(rng.randrange(9))] if count else []
        made, right = whole(tensor, cuts), wanted(state)[tensor.key]
        assert made.dtype == right.dtype
        assert torch.equal(made, right), (tensor.key, cuts)


def test_single_elements_are_made_too(tmp_path: Path):
    state = stored()
    for tensor in outgoing(tmp_path, state, wanted(state)):
        made = whole(tensor, range(numel(tensor.shape)))
        assert torch.equal(made, wanted(state)[tensor.key])


def test_pieces_are_cast(tmp_path: Path):
    state = stored()
    for tensor in outgoing(tmp_path, state, wanted(state), dtype=torch.bfloat16):
        right = wanted(state)[tensor.key]
        if right.dtype.is_floating_point:
            assert torch.equal(whole(tensor, [3, 17, 40]), right.bfloat16())


def test_several_threads_ask_at_once(tmp_path: Path):
    state = stored()
    [tensor] = [t for t in outgoing(tmp_path, state, wanted(state)) if t.key == "l.qkv"]
    result = torch.empty(numel(tensor.shape))
    ready = threading.Barrier(4)

    def ask(first: int) -> None:
        ready.wait()
        for at in range(first, result.numel(), 40):
            tensor.fill(at, result[at : at + 10])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, (0, 10, 20, 30)))
    assert torch.equal(result.view(tensor.shape), wanted(state)["l.qkv"])


def test_stored_copies_that_differ_are_found_in_the_stretch_where_they_do(tmp_path: Path):
    state = {"a": torch.arange(100.0), "b": torch.arange(100.0)}
    state["b"][50] = -1
    both = Table([rename("a", "x"), rename("b", "x")])
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = bioinit.open_checkpoint(tmp_path / "model.safetensors")
    target = Target("x", (100,), torch.float32, (Box.contiguous((100,)),), False, True, None)
    names = Names(both, Table.identity())
    planned = plan(Model({"x": target}, str), checkpoint.tensors, names, init=InitPolicy())
    [tensor] = Stream(planned, checkpoint.files, checkpoint.tensors).outgoing()
    memory = torch.empty(50)
    tensor.fill(0, memory)
    assert torch.equal(memory, state["a"][:50])
    with pytest.raises(PlanError, match="copies differ: 'a' and 'b'"):
        tensor.fill(50, memory)


def test_what_a_conversion_makes_is_made_once_and_then_forgotten(tmp_path: Path):
    state = {"a": torch.arange(12.0).view(3, 4)}
    runs = []

    def run(inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        if inputs[0].device.type != "meta":
            runs.append(1)
        return {"sorted": inputs[0].flip(0), "sums": inputs[0].sum(1)}

    conversion = Conversion(("sorted", "sums"), ("a",), run, "flip")
    targets = {"sorted": torch.empty(3, 4), "sums": torch.empty(3)}
    found = outgoing(tmp_path, state, targets, Table.identity(), [conversion])
    made = {tensor.key: whole(tensor, [5, 7]) for tensor in found}
    assert torch.equal(made["sorted"], state["a"].flip(0))
    assert torch.equal(made["sums"], state["a"].sum(1)) and runs == [1]


def test_only_the_bytes_of_a_stretch_are_read(tmp_path: Path):
    state = {"a": torch.arange(10_000.0)}
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = bioinit.open_checkpoint(tmp_path / "model.safetensors")
    target = Target("a", (10_000,), torch.float32, (Box.contiguous((10_000,)),), False, True, None)
    identity = Names(Table.identity(), Table.identity())
    planned = plan(Model({"a": target}, str), checkpoint.tensors, identity, init=InitPolicy())
    read: list[int] = []
    stream = Stream(planned, checkpoint.files, checkpoint.tensors, read.append)
    [tensor] = stream.outgoing(lambda key: f"module.{key}")
    assert tensor.key == "module.a"
    tensor.fill(500, torch.empty(100))
    assert stream.bytes_read == sum(read) == 400
