"""Replicas that share the reading: storage is read once, and everybody has every byte."""

import itertools
import sys
import tempfile
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bioinit import ranks
from bioinit.backends.module import BACKEND
from bioinit.config import InitPolicy
from bioinit.errors import PlanError, StorageError
from bioinit.families import open_checkpoint
from bioinit.layout import Overlap
from bioinit.load import exchange, execute, groups
from bioinit.load.exchange import Share, Stretch, divided, is_worth_it, packets
from bioinit.load.groups import Groups, rounds
from bioinit.mapping import Conversion, Mapping, Names
from bioinit.plan import Model, plan
from bioinit.ranks import ALONE
from bioinit.storage import File
from bioinit.targets import describe, local
from tests.processes import together

dist = pytest.mark.dist


def share(key, size, grain=1, cost=None):
    return Share((key,), (size,), size if cost is None else cost, grain)


def read_by(stretches, count):
    sizes = [0] * count
    for stretch in stretches:
        sizes[stretch.reader] += stretch.high - stretch.low
    return sizes


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_element_is_read_by_one_rank_and_each_reads_about_as_much(count):
    shares = tuple(share(f"t{i}", size) for i, size in enumerate((1, 500, 3, 90, 2000, 7, 64)))
    found = divided(shares, count)
    for each in shares:
        parts = [s for s in found if s.key == each.keys[0]]
        assert parts[0].low == 0 and parts[-1].high == each.sizes[0]
        assert all(one.high == two.low for one, two in itertools.pairwise(parts))
    total = sum(each.cost for each in shares)
    assert max(read_by(found, count)) - total / count <= 3


def test_cuts_fall_where_pages_end():
    found = divided((share("a", 10_000, grain=1024),), 3)
    assert [(s.low, s.high) for s in found] == [(0, 3072), (3072, 6144), (6144, 10_000)]


def test_what_cannot_be_cut_goes_to_one_rank():
    shares = (Share(("a", "b"), (10, 20), 100, 0), share("c", 100), share("d", 100, grain=0))
    found = divided(shares, 3)
    assert [s for s in found if s.key in "ab"] == [Stretch("a", 0, 10, 0), Stretch("b", 0, 20, 0)]
    assert [s for s in found if s.key == "d"] == [Stretch("d", 0, 100, 2)]


def test_small_stretches_travel_together_and_long_ones_in_pieces():
    small = [Stretch(f"s{i}", 0, 1000, i % 2) for i in range(100)]
    long = Stretch("long", 100, 100 + 40 * 2**20, 0)
    sent = list(packets([*small, long], lambda key: 4))
    assert sorted(s for packet in sent for s in packet.stretches if s.key != "long") == sorted(
        small
    )
    assert len(sent) == 3 + 2  # three pieces of 64 MiB, one bundle of each rank
    pieces = [packet.stretches[0] for packet in sent if packet.stretches[0].key == "long"]
    assert [p.low for p in pieces] == [100 + i * 16 * 2**20 for i in range(3)]
    assert pieces[-1].high == long.high


def test_memory_is_cut_where_the_file_is_in_the_same_order():
    rows = Overlap((8, 4), 0, (10, 1), 0, (4, 1))
    turned = Overlap((8, 4), 0, (1, 8), 0, (4, 1))
    assert exchange._keeps_order(rows) and not exchange._keeps_order(turned)


class Apart(ranks.World):
    @property
    def hosts(self):
        return ("one", "one", "two", "two")


@pytest.mark.parametrize(
    ("mode", "replicas", "expected"),
    [
        ("auto", (0, 1), False),
        ("auto", (0, 2), True),
        ("on", (0, 1), True),
        ("off", (0, 2), False),
    ],
)
def test_reading_is_shared_where_replicas_sit_on_different_hosts(mode, replicas, expected):
    targets = {
        key: target._replace(replicas=replicas)
        for key, target in describe(nn.Linear(2, 2, device="meta")).items()
    }
    assert is_worth_it(mode, targets, Apart(0, 4)) is expected
    assert not is_worth_it(mode, targets, ALONE)


@pytest.fixture
def own_world():
    if torch.distributed.is_initialized():  # the world of one in which an earlier model was built
        if (built := sys.modules.get("megatron.core.parallel_state")) is not None:
            built.destroy_model_parallel()
        torch.distributed.destroy_process_group()

    def meet():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    yield meet
    torch.distributed.destroy_process_group()


def group():
    """The group of this rank, as an exchange finds it."""
    with Groups.of_all([(0,)], torch.device("cpu"), ALONE).used((0,)) as found:
        return found


def test_a_group_is_made_once_for_as_long_as_it_lives(own_world):
    own_world()
    found = [group(), group()]
    torch.distributed.destroy_process_group()
    own_world()
    found += [group(), group()]
    assert found[0] is found[1] and found[2] is found[3]
    assert found[0] is not found[2]


def test_a_group_in_which_sending_failed_is_not_used_again(own_world):
    own_world()
    groups = Groups.of_all([(0,)], torch.device("cpu"), ALONE)
    failed = group()
    with pytest.raises(StorageError), groups.used((0,)):
        raise StorageError("the cable is cut")
    assert group() is not failed
    end = time.monotonic() + 10
    while failed in torch.distributed.distributed_c10d._world.pg_map and time.monotonic() < end:
        time.sleep(0.01)
    assert failed not in torch.distributed.distributed_c10d._world.pg_map


def test_no_rank_is_in_two_groups_of_one_turn():
    groups = [(0, 1), (1, 2), (2, 3), (0, 3), (4, 5), (0, 1, 2, 3)]
    turns = rounds(reversed(groups))
    assert sorted(each for turn in turns for each in turn) == sorted(groups)
    assert len(turns) == 3
    for turn in turns:
        ranks = [rank for group in turn for rank in group]
        assert len(ranks) == len(set(ranks))


# -- in several processes


class Mixed(nn.Module):
    """Tensors of all sizes and dtypes, one that lies turned in memory and one that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3001, 96)
        self.body = nn.ModuleList([nn.Linear(130, 257) for _ in range(6)])
        self.sixteen = nn.Parameter(torch.empty(513, 301, dtype=torch.bfloat16))
        self.turned = nn.Parameter(torch.empty(301, 400).t())
        self.eighth = nn.Parameter(torch.empty(64, 65).to(torch.float8_e4m3fn), requires_grad=False)
        self.made = nn.Parameter(torch.empty(64, 32))
        self.register_buffer("mask", torch.empty(77, dtype=torch.bool))
        self.register_buffer("count", torch.empty((), dtype=torch.int64))


def stored(seed=3):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in Mixed().state_dict().items():
        if key == "made":
            continue
        values = torch.randn(value.shape, generator=generator)
        if value.dtype == torch.bool:
            state[key] = values > 0
        elif value.dtype == torch.int64:
            state[key] = torch.tensor(7)
        else:
            state[key] = values.to(value.dtype).contiguous()
    state["sixteen"] = state["sixteen"].float()  # a cast on the way
    state["made.a"] = torch.randn(32, 32, generator=generator)
    state["made.b"] = torch.randn(32, 32, generator=generator)
    return state


def on_meta() -> nn.Module:
    return BACKEND.build(Mixed)


MADE = Conversion(
    ("made",), ("made.a", "made.b"), lambda held: {"made": torch.cat(list(held)) * 2}, "cat"
)


def load(folder, module, replicas, world, parallel=True, **policy):
    """Load ``module``, whose targets these ranks hold alike, or as its DTensors say.

    ``replicas`` may also be what gives those of a key.
    """
    with open_checkpoint(folder) as checkpoint:
        targets = describe(module)
        if replicas:
            of = replicas if callable(replicas) else lambda key: replicas
            targets = {key: each._replace(replicas=of(key)) for key, each in targets.items()}
        made = (MADE,) if "made" in targets else ()
        planned = plan(
            Model(targets, lambda key: "nothing"),
            checkpoint.tensors,
            Names(Mapping.identity(), Mapping.identity(), made),
            init=InitPolicy(**policy),
            dtype="module",
        )
        assert not planned.problems
        return execute(
            planned,
            module,
            checkpoint.files,
            checkpoint.tensors,
            backend=BACKEND,
            make=Mixed,
            init=InitPolicy(**policy),
            device=torch.device("cpu"),
            world=world,
            parallel=parallel,
        )


def assert_holds(module, alone):
    for key, target in describe(module).items():
        tensor = local(module.get_parameter(key) if not target.is_buffer else getattr(module, key))
        for box in target.boxes:
            start = tensor.storage_offset() + box.start
            held = tensor.detach().as_strided(box.sizes, box.strides, start)
            expected = alone.state_dict()[key][
                tuple(map(slice, box.offsets, map(sum, zip(box.offsets, box.sizes, strict=True))))
            ]
            assert held.dtype == expected.dtype
            assert torch.equal(as_bytes(held), as_bytes(expected)), key


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def sharded(mesh):
    from torch.distributed.fsdp import fully_shard

    module = on_meta()
    # fully_shard takes what lies row by row.
    module.turned = nn.Parameter(module.turned.detach().contiguous())
    for inner in module.body:
        fully_shard(inner, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(600, 16)
        self.head = nn.Linear(16, 600, bias=False)
        self.head.weight = self.embed.weight


def one_hears_of_duplicates():
    """Each compares what it reads, and what one of them finds is wrong for both."""
    for at in (0, 599):
        weight = torch.randn(600, 16)
        other = weight.clone()
        other[at] += 1
        with tempfile.TemporaryDirectory() as folder:
            state = {"embed.weight": weight, "head.weight": other}
            save_file(state, Path(folder) / "model.safetensors")
            module = BACKEND.build(Tied)
            with pytest.raises(PlanError, match="the copies differ"), ranks.together() as world:
                load(folder, module, EVERYBODY, world)
        assert module.embed.weight.is_meta


@contextmanager
def instead(owner, name, function):
    """``function`` in the place of a method, which it gets as its first argument."""
    was = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: function(was, *args, **kwargs))
    try:
        yield
    finally:
        setattr(owner, name, was)


def one_fails(folder):
    """What each rank hears of a disk that fails under one of them, and after how long."""

    def failing(was, *args):
        if torch.distributed.get_rank() == 1:
            raise StorageError("the disk is gone")
        return was(*args)

    module = on_meta()
    started = time.monotonic()
    with instead(File, "read_into", failing):
        with pytest.raises(StorageError) as raised, ranks.together() as world:
            load(folder, module, EVERYBODY, world)
    assert all(parameter.is_meta for parameter in module.parameters())
    return {"failure": str(raised.value), "seconds": time.monotonic() - started}


def one_stops_sending(folder, alone):
    """What was half sent is never taken for what a later start sends."""

    def failing(was, *args):
        if torch.distributed.get_rank() == 1:
            raise StorageError("the cable is cut")
        return was(*args)

    before = dict(groups._known)
    module = on_meta()
    with instead(exchange.Exchange, "_sent", failing):
        with pytest.raises(StorageError, match="the cable is cut"), ranks.together() as world:
            load(folder, module, EVERYBODY, world)
    assert all(parameter.is_meta for parameter in module.parameters())
    with ranks.together() as world:
        load(folder, module, EVERYBODY, world)
    assert_holds(module, alone)
    assert groups._known[EVERYBODY, "cpu"] is not before[EVERYBODY, "cpu"]


def ones_partners_are_busy(folder, alone, world):
    """Rank 1 sends to rank 0 for longer than rank 2 would wait for a piece."""

    def of(key):
        found = (0, 1) if key.startswith("body") else (1, 2)
        return found if world.rank in found else ()

    def sent(was, self, packet, ranks, group):
        if ranks == (0, 1) and not slow:
            slow.append(time.sleep(4))
        return was(self, packet, ranks, group)

    slow = []
    module = on_meta()
    groups.TIMEOUT, was = timedelta(seconds=2), groups.TIMEOUT
    with instead(exchange.Exchange, "_sent", sent):
        read = load(folder, module, of, world).bytes_read
    groups.TIMEOUT = was
    assert_holds(module, alone)
    return read


EVERYBODY = (0, 1, 2, 3)


def four_ranks(folder):
    from torch.distributed.device_mesh import init_device_mesh

    alone = on_meta()
    whole = load(folder, alone, (), ALONE).bytes_read
    found = {}
    with ranks.together() as world:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "dp"))
        module = sharded(mesh)
        found["hsdp 2x2"] = load(folder, module, (), world).bytes_read / whole
        assert_holds(module, alone)
        # Before there is any other group: members have different numbers of them.
        found["chain"] = ones_partners_are_busy(folder, alone, world) / whole
        for turn in range(2):
            module = on_meta()
            known = divided.cache_info().hits
            report = load(folder, module, EVERYBODY, world)
            assert_holds(module, alone)
            assert module.turned.stride() == alone.turned.stride()
            assert (divided.cache_info().hits > known) == (turn == 1)
            found[f"ddp {turn}"] = report.bytes_read / whole
        made = dict(groups._known)
        module = Mixed()
        load(folder, module, EVERYBODY, world)
        assert_holds(module, alone)
        assert groups._known == made
        pairs = (0, 2) if world.rank % 2 == 0 else (1, 3)
        module = on_meta()
        found["pairs"] = load(folder, module, pairs, world).bytes_read / whole
        assert_holds(module, alone)
        report = load(folder, on_meta(), pairs, world, parallel=False)
        found["off"] = report.bytes_read / whole
    one_hears_of_duplicates()
    one_stops_sending(folder, alone)
    return found | one_fails(folder)


@contextmanager
def written():
    with tempfile.TemporaryDirectory() as folder:
        save_file(stored(), Path(folder) / "model.safetensors")
        yield folder


@pytest.fixture(scope="module")
def parts():
    """What each of four ranks found in all cells."""
    with written() as folder:
        return together(4, four_ranks, folder)


@dist
@pytest.mark.parametrize(
    ("cell", "times", "most"), [("ddp 0", 1, 0.28), ("ddp 1", 1, 0.28), ("pairs", 2, 0.55)]
)
def test_replicas_read_every_byte_once_and_have_all_of_them(parts, cell, times, most):
    read = [part[cell] for part in parts]
    assert sum(read) == pytest.approx(times, rel=0.02)
    assert max(read) < most


@dist
def test_replicas_of_shards_read_every_byte_once_and_have_all_of_them(parts):
    # What is made is made whole by whoever holds a shard of it, and the rest once.
    assert sum(part["hsdp 2x2"] for part in parts) <= 1.02


@dist
def test_a_rank_waits_for_a_partner_that_sends_to_others(parts):
    # Rank 3 shares nothing, rank 1 everything; each other one reads the other half by itself.
    assert parts[1]["chain"] < 0.55 and parts[3]["chain"] == 1
    assert sum(part["chain"] for part in parts) == pytest.approx(3, rel=0.02)


@dist
def test_without_sharing_every_replica_reads_everything(parts):
    assert [part["off"] for part in parts] == [1.0] * 4


@dist
def test_a_rank_that_cannot_read_ends_all_of_them(parts):
    assert all("the disk is gone" in part["failure"] for part in parts)
    assert parts[0]["failure"].startswith("rank 1:")
    assert max(part["seconds"] for part in parts) < 30
