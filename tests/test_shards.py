"""Which boxes a rank holds: against arrays that are really cut, and against torch's own memory."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.distributed.tensor_parallel import PackedColwiseParallel, PackedRowwiseParallel

from bioinit.errors import ConfigError
from bioinit.layout import numel, row_major
from bioinit.shards import Mesh, Split, after_others, boxes, replicas
from bioinit.targets import describe, local, mesh_device


def meshes_of(sizes):
    """The mesh as each of its ranks sees it."""
    ranks = tuple(range(math.prod(sizes)))
    for rank in ranks:
        yield Mesh(sizes, tuple(map(int, np.unravel_index(rank, sizes))), ranks)


def chunk(array, dim, count, index):
    size = -(-array.shape[dim] // count)
    return np.take(array, range(index * size, min((index + 1) * size, array.shape[dim])), dim)


def cut(array, order, mesh):
    """What is left of ``array`` when the axes have divided it one after another."""
    for axis, (dim, groups) in order:
        parts = [chunk(array, dim, groups, group) for group in range(groups)] or [array]
        array = np.concatenate(
            [chunk(part, dim, mesh.sizes[axis], mesh.coordinate[axis]) for part in parts], dim
        )
    return array


def put_together(shape, found, size):
    """The flat local memory of a tensor of arange as the boxes have it; -1 where they do not."""
    whole = np.arange(numel(shape)).reshape(shape)
    memory = np.full(size, -1)
    for box in found:
        region = whole[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))]
        assert region.shape == box.sizes
        for index in np.ndindex(*box.sizes):
            place = box.start + sum(i * s for i, s in zip(index, box.strides, strict=True))
            assert memory[place] == -1
            memory[place] = region[index]
    return memory


@st.composite
def divisions(draw):
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    dims = st.integers(0, len(shape) - 1)
    split = st.builds(Split, dims, st.sampled_from([0, 0, 0, 2, 3, 4, 6]))
    placements = [draw(st.none() | split) for _ in sizes]
    axes = [axis for axis, placement in enumerate(placements) if placement is not None]
    order = tuple((axis, placements[axis]) for axis in draw(st.permutations(axes)))
    return shape, sizes, placements, order, draw(st.permutations(range(len(shape))))


@settings(max_examples=300, deadline=None)
@given(divisions())
def test_boxes_are_what_is_left_when_the_axes_have_cut_one_after_another(division):
    shape, sizes, placements, order, permuted = division
    whole = np.arange(numel(shape)).reshape(shape)
    for mesh in meshes_of(sizes):
        wanted = cut(whole, order, mesh)
        strides = [0] * len(shape)
        inner = row_major(tuple(wanted.shape[dim] for dim in permuted))
        for dim, stride in zip(permuted, inner, strict=True):
            strides[dim] = stride
        found = boxes("w", shape, mesh, placements, wanted.shape, tuple(strides), order)
        memory = put_together(shape, found, wanted.size)
        assert np.array_equal(memory, wanted.transpose(permuted).ravel())
        assert all(box.sizes and numel(box.sizes) for box in found)


@settings(max_examples=100, deadline=None)
@given(divisions())
def test_replicas_are_the_ranks_whose_boxes_are_the_same(division):
    shape, sizes, placements, order, _ = division
    whole = np.arange(numel(shape)).reshape(shape)
    held = [cut(whole, order, mesh) for mesh in meshes_of(sizes)]
    for rank, mesh in enumerate(meshes_of(sizes)):
        same = replicas(mesh, placements)
        assert not same or (rank in same and list(same) == sorted(same) and len(same) > 1)
        assert all(np.array_equal(held[rank], held[other]) for other in same)
        if not same:  # an axis that divides tells ranks apart by their place in it alone
            assert all(size == 1 for size, p in zip(sizes, placements, strict=True) if p is None)


def test_replicas_carry_the_numbers_of_the_mesh_and_not_positions_in_it():
    mesh = Mesh((2, 2), (1, 0), (4, 6, 5, 7))
    assert replicas(mesh, (None, Split(0))) == (4, 5)
    assert replicas(mesh, (Split(0), None)) == (5, 7)
    assert replicas(mesh, (Split(0), Split(1))) == ()
    assert replicas(mesh, (None, None)) == (4, 5, 6, 7)


def of_each_rank(size, function):
    """``function()`` as every rank of a world that does not communicate."""
    found = []
    for rank in range(size):
        distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        try:
            found.append(function())
        finally:
            distributed.destroy_process_group()
    return found


def mesh_of(sizes, *names):
    # torch remembers what it made of equal meshes, and equal they are though the ranks differ.
    mine = distributed.get_rank()
    return init_device_mesh("cpu", sizes, mesh_dim_names=[f"{name}{mine}" for name in names])


def axes(mesh, *numbers):
    return mesh[tuple(mesh.mesh_dim_names[number] for number in numbers)]


def whole_of(shape):
    return torch.arange(math.prod(shape), dtype=torch.float32).view(shape)


def assert_described(root, shape):
    """The boxes say exactly what lies in the local memory of ``root.w``."""
    target = describe(root)["w"]
    held = local(root.w)
    assert target.shape == tuple(shape)
    assert target.held == held.numel()
    memory = held.detach().contiguous().reshape(-1)
    assert all(box.strides == held.stride() for box in target.boxes)
    assert put_together(shape, target.boxes, held.numel()).tolist() == memory.tolist()
    return target


def holder(tensor):
    root = nn.Module()
    root.w = nn.Parameter(tensor)
    return root


PLACEMENTS = [
    ((4,), (7, 3), [Shard(0)]),
    ((4,), (5, 3), [Shard(0)]),
    ((4,), (3, 6), [Shard(-1)]),
    ((4,), (9, 2), [_StridedShard(0, split_factor=2)]),
    ((4,), (2, 12), [_StridedShard(-1, split_factor=2)]),
    ((4,), (3, 2), [_StridedShard(0, split_factor=5)]),
    ((2, 3), (7, 5), [Shard(0), Shard(1)]),
    ((2, 3), (7, 5), [Shard(1), Replicate()]),
    ((2, 3), (11, 2), [Shard(0), Shard(0)]),
    ((2, 3), (12, 2), [_StridedShard(0, split_factor=3), Shard(0)]),
    ((2, 2), (9, 3), [Shard(0), _StridedShard(0, split_factor=2)]),
    ((2, 2, 2), (9, 5, 3), [Replicate(), Shard(1), Shard(0)]),
    ((2, 2, 2), (13, 2), [Shard(0), Shard(0), Shard(0)]),
    ((2, 2), (0, 3), [Shard(0), Replicate()]),
]


@pytest.mark.parametrize(("sizes", "shape", "placements"), PLACEMENTS)
def test_what_distribute_tensor_leaves_in_memory_is_what_the_boxes_say(sizes, shape, placements):
    def check():
        mesh = mesh_of(sizes, *"abc"[: len(sizes)])
        divided = distribute_tensor(whole_of(shape), mesh, placements, src_data_rank=None)
        return assert_described(holder(divided), shape)

    found = of_each_rank(math.prod(sizes), check)
    elements = {
        index
        for target in found
        for box in target.boxes
        for index in itertools.product(
            *(range(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
        )
    }
    assert len(elements) == math.prod(shape)


DIVIDED_TWICE = [
    ((2, 2), (8, 3), [Shard(0)]),
    ((2, 3), (7, 3), [Shard(0)]),
    ((4, 2), (9, 3), [Shard(0)]),
    ((2, 4), (5, 3), [Shard(0)]),
    ((3, 2), (5, 7), [Shard(1)]),
    ((2, 2), (12, 3), [_StridedShard(0, split_factor=2)]),
    ((2, 2), (11, 3), [_StridedShard(0, split_factor=2)]),
    ((2, 2), (5, 12, 3), [_StridedShard(1, split_factor=2)]),
    ((4, 2), (7, 3), [Replicate()]),
]


@pytest.mark.parametrize(("sizes", "shape", "placements"), DIVIDED_TWICE)
def test_fully_shard_divides_what_tensor_parallelism_left(sizes, shape, placements):
    def check():
        mesh = mesh_of(sizes, "dp", "tp")
        divided = distribute_tensor(whole_of(shape), axes(mesh, 1), placements, src_data_rank=None)
        root = holder(divided)
        mine = local(root.w).clone()
        fully_shard(root, mesh=axes(mesh, 0))
        wanted = chunk(mine.numpy(), 0, sizes[0], mesh.get_local_rank(0))
        assert np.array_equal(local(root.w).numpy().ravel(), wanted.ravel())
        return assert_described(root, shape)

    of_each_rank(math.prod(sizes), check)


def test_the_order_of_the_axes_is_known_where_fully_shard_divided_over_three():
    def check():
        mesh = mesh_of((2, 2, 2), "replicate", "dp", "tp")
        divided = distribute_tensor(whole_of((7, 2)), axes(mesh, 2), [Shard(0)], src_data_rank=None)
        root = holder(divided)
        fully_shard(root, mesh=axes(mesh, 0, 1))
        target = assert_described(root, (7, 2))
        assert len(target.replicas) == 2
        return target

    found = of_each_rank(8, check)
    for rank, target in enumerate(found):
        assert target.replicas == tuple(sorted((rank, (rank + 4) % 8)))
        assert target.boxes == found[(rank + 4) % 8].boxes


@pytest.mark.parametrize("style", [PackedColwiseParallel, PackedRowwiseParallel])
def test_packed_projections_of_transformers_hold_a_chunk_of_each_half(style):
    def check():
        mesh = mesh_of((3,), "tp")
        root = holder(whole_of((2, 10, 10)))
        style().shard_param(root, "w", mesh)
        target = assert_described(root, (2, 10, 10))
        assert len(target.boxes) == 2
        return target

    of_each_rank(3, check)


def test_a_local_tensor_that_is_not_row_major_is_described_as_it_is():
    def check():
        mesh = mesh_of((2,), "dp")
        rows = [slice(0, 3), slice(3, 5)][mesh.get_local_rank()]
        held = whole_of((5, 4)).t().contiguous().t()[rows]
        root = holder(DTensor.from_local(held, mesh, [Shard(0)], shape=(5, 4), stride=(1, 5)))
        target = describe(root)["w"]
        assert local(root.w).stride() == (1, 5)
        assert target.boxes[0].strides == (1, 5)
        part = local(root.w).as_strided(target.boxes[0].sizes, target.boxes[0].strides, rows.start)
        assert torch.equal(part, whole_of((5, 4))[rows])

    of_each_rank(2, check)


def test_what_the_placements_leave_open_is_refused_and_never_guessed():
    # Two groups, or the rows of two ranks: the shape is the same, the rows are not.
    mesh = Mesh((2, 2), (0, 0), (0, 1, 2, 3))
    placements = (Split(0, 2), Split(0, 2))
    with pytest.raises(ConfigError, match=r"several orders.*fully_shard") as caught:
        boxes("gate_up", (8, 3), mesh, placements, (2, 3), (3, 1))
    assert "gate_up [8, 3]" in str(caught.value)
    assert "Strided(0, 2), Strided(0, 2)" in str(caught.value)
    order = after_others(placements, mesh.sizes)
    [box] = boxes("gate_up", (8, 3), mesh, placements, (2, 3), (3, 1), order)
    assert (box.offsets, box.sizes) == ((0, 0), (2, 3))


def test_an_order_that_the_shape_alone_settles_is_taken():
    # Nine rows over dp 4 and tp 2: only fully_shard leaves nothing to the last rank of tp 0.
    mesh = Mesh((4, 2), (3, 0), tuple(range(8)))
    placements = (Split(0, 2), Split(0))
    assert boxes("w", (9,), mesh, placements, (0,), (1,)) == ()
    [box] = boxes("w", (9,), mesh, placements, (1,), (1,))
    assert box.offsets == (8,)


def test_a_local_tensor_of_another_shape_is_refused_with_both_shapes():
    mesh = Mesh((2,), (1,), (0, 1))
    with pytest.raises(ConfigError, match=r"w \[5, 4\].*\[3, 4\], but should be \[2, 4\]"):
        boxes("w", (5, 4), mesh, (Split(0),), (3, 4), (4, 1))


def test_sums_that_are_not_made_yet_are_refused():
    def check():
        mesh = mesh_of((2,), "dp")
        root = holder(DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False))
        with pytest.raises(ConfigError, match=r"w \[3\].*Partial"):
            describe(root)

    of_each_rank(2, check)


def test_two_names_of_one_divided_parameter_are_tied_even_where_nothing_lies_here():
    def check():
        mesh = mesh_of((4,), "dp")
        root = nn.Module()
        divided = distribute_tensor(whole_of((3, 2)), mesh, [Shard(0)], src_data_rank=None)
        root.a = nn.Parameter(divided)
        root.b = root.a
        root.c = nn.Parameter(divided.clone())
        found = describe(root)
        assert [found[key].tied_to for key in "abc"] == [None, "a", None]
        return found["a"].boxes

    assert of_each_rank(4, check)[3] == ()


def test_equal_parameters_share_what_was_worked_out():
    def check():
        mesh = mesh_of((2,), "dp")
        root = nn.Module()
        for name in "ab":
            divided = distribute_tensor(whole_of((6, 2)), mesh, [Shard(0)], src_data_rank=None)
            setattr(root, name, nn.Parameter(divided))
        found = describe(root)
        assert found["a"].boxes is found["b"].boxes

    of_each_rank(2, check)


def test_fully_shard_may_divide_columns():
    def check():
        root = holder(whole_of((3, 8)))
        fully_shard(root, mesh=mesh_of((4,), "dp"), shard_placement_fn=lambda parameter: Shard(1))
        return assert_described(root, (3, 8))

    assert [target.boxes[0].offsets for target in of_each_rank(4, check)] == [
        (0, 0),
        (0, 2),
        (0, 4),
        (0, 6),
    ]


def test_a_divided_module_says_on_what_kind_of_device():
    def check():
        root = nn.Module()
        root.plain = nn.Parameter(torch.zeros(2))
        assert mesh_device(root) is None
        mesh = mesh_of((2,), "dp")
        root.w = nn.Parameter(
            distribute_tensor(whole_of((4,)), mesh, [Shard(0)], src_data_rank=None)
        )
        return mesh_device(root)

    assert of_each_rank(2, check) == ["cpu", "cpu"]
