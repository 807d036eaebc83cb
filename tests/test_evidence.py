"""A rank that owns a part of the model concludes what one process would, and sends little."""

import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed import HashStore

from bioinit.config import InitPolicy
from bioinit.formats import open_weights
from bioinit.mapping import Mapping, Names
from bioinit.plan import Model, plan, unite
from bioinit.ranks import ALONE, joined
from bioinit.ranks.watch import Pace
from bioinit.rules import Each, Narrow, Part, Rule, Unflatten
from bioinit.storage import Folder
from bioinit.targets import describe

IDENTITY = Names(Mapping.identity(), Mapping.identity())
STACKED = Names(
    Mapping([Rule("stack", (Part("layers.*.weight", (Each(0, 0),)),)), Rule("**", (Part("**"),))]),
    Mapping.identity(),
)


PADDED = Names(
    Mapping(
        [
            Rule("odd", (Part("even", (Unflatten(0, (2, 4)),)),)),
            Rule("rows", (Part("rows", (Narrow(0, 0, 5),)),), fill=True),
            Rule("**", (Part("**"),)),
        ]
    ),
    Mapping.identity(),
)


class Body(nn.Module):
    def __init__(self, layers=6) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(layers)])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def in_stages(key, rank):
    """Two interleaved stages: the ends, and every other pair of layers each."""
    if key.startswith("layers."):
        return int(key.split(".")[1]) // 2 % 2 == rank
    return key.startswith("norm.") == bool(rank)


def everywhere(key, rank):
    return True


def conclusions(contents, names, world, owns, skip, policy):
    targets = describe(Body())
    mine = {key: target for key, target in targets.items() if owns(key, world.rank)}
    sent = []

    def share(evidence):
        united = unite(world, evidence)
        sent.append(united is not evidence)
        return united

    decided = plan(
        Model(mine, lambda key: f"init of {key}"),
        contents.tensors,
        names,
        init=InitPolicy(**policy),
        skip_prefixes=skip,
        share=None if world is ALONE else share,
    )
    problems = [(p.kind, p.key, p.message) for p in decided.problems]
    said = decided.tensors, decided.unused, problems, dict(decided.hits), decided.notes
    return said, set(decided.targets), sent


@pytest.fixture
def compared(tmp_path):
    """What one process concludes, and what each of ``size`` ranks does that own parts."""

    def compare(tensors, names=IDENTITY, owns=in_stages, size=2, skip=(), **policy):
        save_file(tensors, tmp_path / "model.safetensors")
        _, contents = open_weights(Folder.at(tmp_path))
        one, _, _ = conclusions(contents, names, ALONE, everywhere, skip, policy)
        store, found = HashStore(), [None] * size
        pace = Pace(tick=0.1, lost=5, join=5, heard=2, interrupt=60, grace=60)

        def run(rank):
            try:
                with joined(store, rank, size, "plan", pace) as world:
                    found[rank] = conclusions(contents, names, world, owns, skip, policy)
            except BaseException as error:
                found[rank] = error

        running = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(60)
        return one, found

    return compare


def state(**changes):
    held = {k: v.detach().clone() for k, v in Body().state_dict().items() if k != "head.weight"}
    held.update(changes)
    return {k: v for k, v in held.items() if v is not None}


@pytest.mark.parametrize(
    ("tensors", "options"),
    [
        (state(), {}),
        (state(spare=torch.ones(2)), {}),
        (state(spare=torch.ones(2)), {"on_unused": "error"}),
        (state(**{"layers.3.weight": None}), {}),
        (state(**{"layers.3.weight": None, "layers.3.weigth": torch.ones(4, 4)}), {}),
        (state(**{"norm.bias": torch.ones(9)}), {}),
        (state(), {"skip": ("layers.2", "norm")}),
        (state(), {"skip": ("layer.2", "head")}),
        (state(**{"norm.bias": None}), {"on_missing": "init"}),
    ],
)
def test_stages_conclude_what_one_process_does(compared, tensors, options):
    one, found = compared(tensors, **options)
    for said, _, _ in found:
        assert said == one
    assert found[0][1] & found[1][1] == set()
    assert {c.key for c in one[0] if c.claim != "tied"} == found[0][1] | found[1][1]


def test_layers_inside_of_one_tensor_are_unused_only_if_no_stage_wants_them(compared):
    rest = {k: v for k, v in state().items() if not k.startswith("layers.")}
    one, found = compared({"stack": torch.ones(8, 4, 4), **rest}, STACKED)
    [left] = one[1]
    assert left.key == "stack" and left.folded == ["layers.{6..7}.weight"]
    for said, _, _ in found:
        assert said == one


@pytest.mark.parametrize("skip", [(), ("rows", "norm")])
@pytest.mark.parametrize("size", [2, 6])
def test_what_is_wrong_with_tensors_that_nobody_wants_is_said_by_however_many_ranks(
    compared, size, skip
):
    """A process that owns little does not place them, and one that owns more does."""
    tensors = state(odd=torch.ones(9, 4), rows=torch.ones(30, 4))
    one, found = compared(tensors, PADDED, lambda key, rank: in_stages(key, rank % 2), size, skip)
    _, _, problems, _, notes = one
    assert [(kind, key) for kind, key, _ in problems] == [("mismatch", "odd")]
    assert notes == ("rows beyond the vocabulary are left out: 25 of rows",)
    for said, _, _ in found:
        assert said == one


def test_claims_are_in_the_order_of_the_whole_state_dict(compared):
    _, found = compared(state())
    assert [claim.key for claim in found[1][0][0]] == list(Body().state_dict())


def test_where_all_ranks_claim_the_same_nothing_but_a_digest_is_sent(compared):
    one, found = compared(state(spare=torch.ones(2)), owns=everywhere, size=3)
    for said, _, sent in found:
        assert said == one and sent == [False]


def test_replicas_of_a_stage_send_it_once(compared):
    one, found = compared(state(), owns=lambda key, rank: in_stages(key, rank // 3), size=6)
    for said, _, sent in found:
        assert said == one and sent == [True]
