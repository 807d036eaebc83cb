"""Loading into divided parameters: every rank gets its part of the whole, and reads no more."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

import bioinit
from bioinit.errors import CorruptCheckpoint
from bioinit.report import human_bytes
from bioinit.targets import describe, local
from tests.processes import together

pytestmark = pytest.mark.dist


class Block(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, inner)
        self.down = nn.Linear(inner, 6)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Nothing but the blocks' inner size divides, and one tensor is larger than 2 MiB."""

    def __init__(self, inner: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList([Block(inner) for _ in range(2)])
        self.wide = nn.Linear(6, 100_001, bias=False)
        self.few = nn.Linear(6, 3)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(5))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x).sum() + self.few(x).sum() + self.wide(x).mean()


def on_meta(inner: int = 8) -> Net:
    with torch.device("meta"):
        model = Net(inner)
    model.head.weight = model.embed.weight
    return model


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    for inner in (8, 7):
        torch.manual_seed(inner)
        state = {k: v.clone() for k, v in Net(inner).state_dict().items() if k != "head.weight"}
        save_file(state, folder / f"{inner}.safetensors")
    torch.manual_seed(0)
    packed = {"w": torch.randn(4, 12, 5), "t": torch.randn(9, 4)}
    save_file(packed, folder / "packed.safetensors")
    return folder


def assert_holds(model, state):
    """Every element that lies here is bit-equal to the one of the whole tensor."""
    for key, target in describe(model).items():
        wanted = state.get(target.tied_to or key)
        if wanted is None:
            continue
        held = local(dict(model.state_dict(keep_vars=True))[key]).detach()
        assert target.shape == wanted.shape
        assert target.held == held.numel()
        for offsets, sizes, start, strides in target.boxes:
            part = held.as_strided(sizes, strides, held.storage_offset() + start)
            region = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            assert torch.equal(part, wanted[region].to(held.dtype)), (key, target)


def state_of(path):
    with bioinit.open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def claims_of(report):
    return [claim.to_json() for claim in report.claims]


def alone(path, inner=8):
    """What one process makes of it: the claims, and what the model computes."""
    model = on_meta(inner)
    report = bioinit.load_weights(model, path)
    return claims_of(report), model(IDS).item()


IDS = torch.tensor([[1, 2, 10, 4], [0, 3, 3, 9]])


def fully_sharded(model, mesh):
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model, mesh):
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def share_of(model):
    tensors = {id(t): local(t) for t in model.state_dict(keep_vars=True).values()}
    return sum(tensor.nbytes for tensor in tensors.values())


def load_and_compare(model, path, inner=8, *, most=1.02):
    """Load, and hold everything against one process."""
    state = state_of(path)
    report = bioinit.load_weights(model, path)
    assert_holds(model, state)
    claims, value = alone(path, inner)
    assert claims_of(report) == claims
    assert report.parameters == sum(state[key].numel() for key, _ in model.named_parameters())
    assert report.bytes_read == report.document()["bytes_to_read"]
    assert report.bytes_read <= most * share_of(model)
    assert report.document()["memory"]["parameters"] == share_of(model)
    computed = model(IDS)
    computed = computed.full_tensor() if isinstance(computed, DTensor) else computed
    assert abs(computed.item() - value) <= 1e-5 * abs(value)
    if isinstance(model, FSDPModule):
        model.reshard()
    return report


def in_two(folder):
    even, odd, packed = (folder / f"{name}.safetensors" for name in (8, 7, "packed"))
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("x",))
    rank = mesh.get_local_rank()

    # fully_shard, before and after there is memory; and once more into what has been used.
    model = fully_sharded(on_meta(), mesh)
    load_and_compare(model, even)
    assert model.head.weight is model.embed.weight
    memory = {key: local(t).data_ptr() for key, t in model.named_parameters()}
    bioinit.load_weights(model, even)
    assert memory == {key: local(t).data_ptr() for key, t in model.named_parameters()}
    load_and_compare(fully_sharded(Net(), mesh), even)

    # The memory that fully_shard uses for its collectives is the parameter's own, padding included.
    model = fully_sharded(on_meta(), mesh)
    bioinit.load_weights(model, even)
    before = {key: local(t).data_ptr() for key, t in model.named_parameters()}
    storages = {key: local(t).untyped_storage().nbytes() for key, t in model.named_parameters()}
    model(IDS)
    model.reshard()
    assert before == {key: local(t).data_ptr() for key, t in model.named_parameters()}
    assert storages["few.weight"] == 2 * 6 * 4

    # What is gathered at the moment is given back: what is read into it would be thrown away.
    model.unshard()
    assert not isinstance(model.few.weight, DTensor)
    load_and_compare(model, even)

    # Tensor parallelism, with rows that divide and rows that do not.
    load_and_compare(tensor_parallel(on_meta(), mesh), even)
    load_and_compare(tensor_parallel(Net(), mesh), even)
    model = tensor_parallel(on_meta(7), mesh)
    bioinit.load_weights(model, odd)
    assert_holds(model, state_of(odd))
    assert tuple(local(model.blocks[0].up.weight).shape) == ((4, 6), (3, 6))[rank]

    # A dtype of the module's own, attributes, what is frozen.
    model = on_meta().bfloat16()
    model.embed.weight.requires_grad_(False)
    model = tensor_parallel(model, mesh)
    model.blocks[0].up.weight.sequence_parallel = True
    bioinit.load_weights(model, even)
    assert_holds(model, state_of(even))
    assert model.blocks[0].up.weight.dtype == torch.bfloat16
    assert model.blocks[0].up.weight.sequence_parallel
    assert model.blocks[0].up.weight.requires_grad
    assert not model.embed.weight.requires_grad

    # Two boxes of one tensor, and memory that is not row-major.
    state = state_of(packed)
    for device in ("meta", "cpu"):
        root = nn.Module()
        whole = torch.zeros(4, 12, 5, device=device)
        strided = [_StridedShard(1, split_factor=2)]
        root.w = nn.Parameter(distribute_tensor(whole, mesh, strided, src_data_rank=None))
        held = torch.zeros(4, (5, 4)[rank], device=device).t()
        root.t = nn.Parameter(
            DTensor.from_local(held, mesh, [Shard(0)], shape=(9, 4), stride=(1, 9))
        )
        assert local(root.t).stride() == (1, held.shape[0])
        report = bioinit.load_weights(root, packed)
        assert local(root.t).stride() == (1, held.shape[0])
        assert_holds(root, state)
        assert report.bytes_read == report.document()["bytes_to_read"]
        half = torch.cat(
            [state["w"][:, 3 * rank :][:, :3], state["w"][:, 6 + 3 * rank :][:, :3]], 1
        )
        assert torch.equal(local(root.w), half)

    # Columns of narrow rows are read along, and the plan says how many bytes that is.
    root = nn.Module()
    whole = torch.empty(4, 12, 5, device="meta")
    root.w = nn.Parameter(distribute_tensor(whole, mesh, [Shard(2)], src_data_rank=None))
    report = bioinit.load_weights(root, packed, on_unused="report")
    assert_holds(root, state)
    document = report.document()
    mine, along = local(root.w).nbytes, 47 * (2, 3)[rank] * 4
    assert report.bytes_read == document["bytes_to_read"] == mine + along
    assert f"{human_bytes(along)} between wanted columns are read along" in document["notes"]

    # A conversion makes whole tensors; each rank keeps its part.
    root = nn.Module()
    with torch.device("meta"):
        root.w = nn.Parameter(torch.empty(4, 5, 12))
        root.t = nn.Parameter(torch.empty(9, 4))
    root.w = nn.Parameter(distribute_tensor(root.w.data, mesh, [Shard(0)], src_data_rank=None))
    root.t = nn.Parameter(distribute_tensor(root.t.data, mesh, [Replicate()], src_data_rank=None))

    turn = bioinit.transform(sources="w", target="w")(lambda w: w.transpose(1, 2) * 2)
    bioinit.load_weights(root, packed, mapping=bioinit.Mapping([turn, bioinit.rename("t", "t")]))
    part = state["w"].transpose(1, 2)[2 * rank : 2 * rank + 2] * 2
    assert torch.equal(local(root.w), part)
    assert describe(root)["t"].replicas == (0, 1)

    # A failed load leaves a module on meta on meta, and says what it changed of another.
    model = fully_sharded(on_meta(), mesh)
    with pytest.raises(CorruptCheckpoint):
        bioinit.load_weights(model, cut_short(folder, even, rank))
    assert all(p.is_meta for p in model.parameters())
    load_and_compare(model, even)


def cut_short(folder, path, rank):
    broken = folder / f"broken{rank}.safetensors"
    broken.write_bytes(path.read_bytes()[:-100])
    return broken


def in_four(folder):
    even, odd = folder / "8.safetensors", folder / "7.safetensors"
    line = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    # Three rows over four ranks: the last one holds nothing of them, and claims them all the same.
    model = fully_sharded(on_meta(), line)
    load_and_compare(model, even)
    if line.get_local_rank() == 3:
        assert local(model.few.weight).numel() == 0
        assert describe(model)["few.weight"].boxes == ()

    for model in (on_meta(), Net()):
        load_and_compare(fully_sharded(tensor_parallel(model, square["tp"]), square["dp"]), even)
    model = fully_sharded(tensor_parallel(on_meta(7), square["tp"]), square["dp"])
    bioinit.load_weights(model, odd)
    assert_holds(model, state_of(odd))
    rows = [(2, 2), (2, 1)][square.get_local_rank("dp")][square.get_local_rank("tp")]
    assert tuple(local(model.blocks[0].up.weight).shape) == (rows, 6)
    first = 4 * square.get_local_rank("tp") + 2 * square.get_local_rank("dp")
    wanted = state_of(odd)["blocks.0.up.weight"][first : first + rows]
    assert torch.equal(local(model.blocks[0].up.weight), wanted)

    for sizes in ((2, 1, 2), (1, 2, 2), (2, 2, 1)):
        cube = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "dp", "tp"))
        for model in (on_meta(), Net()):
            model = fully_sharded(tensor_parallel(model, cube["tp"]), cube["replicate", "dp"])
            load_and_compare(model, even)
        mine = describe(model)["blocks.0.up.weight"].replicas
        assert len(mine) == (2 if sizes[0] == 2 else 0)


def test_two_ranks_fill_their_parts_and_read_no_more_than_them(stored):
    together(2, in_two, stored)


def test_four_ranks_fill_their_parts_on_meshes_of_one_two_and_three_axes(stored):
    together(4, in_four, stored)
