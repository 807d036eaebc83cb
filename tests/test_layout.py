"""Boxes, held against torch's own slicing."""

import itertools
import random

import pytest
import torch

from bioinit.layout import Box, Overlap, blocks, fold, intersect, numel, restrict, row_major


def view(memory: torch.Tensor, sizes, strides, start) -> torch.Tensor:
    return memory.as_strided(sizes, strides, start)


def test_contiguous_box_describes_a_row_major_tensor():
    assert Box.contiguous((2, 3, 4)) == Box((0, 0, 0), (2, 3, 4), 0, (12, 4, 1))
    assert Box.contiguous(()) == Box((), (), 0, ())


def test_equal_contiguous_boxes_overlap_in_one_run():
    box = Box.contiguous((4, 5, 6))
    assert intersect(box, box) == Overlap((120,), 0, (1,), 0, (1,))


def test_disjoint_boxes_share_nothing():
    left = Box((0, 0), (2, 4), 0, (4, 1))
    right = Box((2, 0), (2, 4), 0, (4, 1))
    assert intersect(left, right) is None


def test_a_scalar_overlaps_itself_as_one_element():
    assert intersect(Box.contiguous(()), Box.contiguous(())) == Overlap((), 0, (), 0, ())


@pytest.mark.parametrize("seed", range(40))
def test_an_overlap_moves_exactly_the_shared_region(seed):
    dice = random.Random(seed)
    shape = tuple(dice.randint(1, 5) for _ in range(dice.randint(1, 4)))
    whole = torch.arange(numel(shape)).reshape(shape)

    def random_box():
        offsets = tuple(dice.randrange(size) for size in shape)
        sizes = tuple(dice.randint(1, s - o) for s, o in zip(shape, offsets, strict=True))
        order = dice.sample(range(len(shape)), len(shape))
        held = row_major(tuple(sizes[d] for d in order))
        strides = [0] * len(shape)
        for place, dim in enumerate(order):
            strides[dim] = held[place]
        return Box(offsets, sizes, dice.randint(0, 3), tuple(strides))

    source, target = random_box(), random_box()
    index = tuple(slice(o, o + s) for o, s in zip(source.offsets, source.sizes, strict=True))
    stored = torch.full((numel(shape) + 8,), -1)
    view(stored, source.sizes, source.strides, source.start).copy_(whole[index])
    memory = torch.full((numel(shape) + 8,), -1)
    overlap = intersect(source, target)
    expected = torch.full(shape, -1)
    for point in itertools.product(*map(range, shape)):
        if all(
            b.offsets[d] <= point[d] < b.offsets[d] + b.sizes[d]
            for b in (source, target)
            for d in range(len(shape))
        ):
            expected[point] = whole[point]
    if overlap is not None:
        view(memory, overlap.sizes, overlap.target_strides, overlap.target_start).copy_(
            view(stored, overlap.sizes, overlap.source_strides, overlap.source_start)
        )
    got = view(memory, target.sizes, target.strides, target.start)
    into = tuple(slice(o, o + s) for o, s in zip(target.offsets, target.sizes, strict=True))
    assert torch.equal(got, expected[into])


@pytest.mark.parametrize("limit", [1, 7, 64, 10_000])
@pytest.mark.parametrize(
    ("shape", "transform"),
    [
        ((8, 16), lambda t: t),
        ((8, 16), lambda t: t.t()),
        ((8, 16), lambda t: t[:, 3:7]),
        ((4, 6, 5), lambda t: t.permute(2, 0, 1)[1:4]),
        ((3, 40_000), lambda t: t[:, :5]),
    ],
)
def test_blocks_read_every_element_once_and_no_span_exceeds_the_limit(shape, transform, limit):
    memory = torch.arange(numel(shape))
    wanted = transform(memory.reshape(shape))
    sizes = tuple(wanted.shape)
    overlap = fold(sizes, wanted.storage_offset(), wanted.stride(), 0, row_major(sizes))
    out = torch.full((numel(sizes),), -1)
    for block in blocks(overlap, limit):
        assert block.span <= limit
        part = block.overlap
        buffer = memory[part.source_start : part.source_start + block.span].clone()
        out.as_strided(part.sizes, part.target_strides, part.target_start).copy_(
            buffer.as_strided(part.sizes, part.source_strides, 0)
        )
    assert torch.equal(out.reshape(sizes), wanted)


def test_wide_gaps_are_not_read_along():
    overlap = Overlap((3, 5), 0, (40_000, 1), 0, (5, 1))
    assert sum(block.span for block in blocks(overlap, 1 << 30)) == 15


@pytest.mark.parametrize("seed", range(40))
def test_a_stretch_of_a_target_is_covered_once_and_nothing_outside_of_it(seed):
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 5) for _ in range(rng.randint(0, 4)))
    offsets = tuple(rng.randrange(size) for size in shape)
    sizes = tuple(
        rng.randint(1, size - offset) for size, offset in zip(shape, offsets, strict=True)
    )
    strides = list(row_major(sizes))
    source = Box(offsets, sizes, rng.randrange(3), tuple(strides))
    overlap = intersect(source, Box.contiguous(shape))
    assert overlap is not None
    wanted = pairs(overlap)
    end = numel(shape)
    low = rng.randint(0, end)
    high = rng.randint(low, end)
    parts = list(restrict(overlap, low, high))
    found = [pair for part in parts for pair in pairs(part)]
    assert sorted(found) == sorted(pair for pair in wanted if low <= pair[0] < high)
    assert len(set(found)) == len(found)


def test_views_that_interleave_are_cut_at_the_same_element():
    gate = Overlap((4, 2), 0, (2, 1), 1, (5, 1))
    for low in range(21):
        found = [pair for part in restrict(gate, low, low + 4) for pair in pairs(part)]
        assert sorted(found) == [pair for pair in sorted(pairs(gate)) if low <= pair[0] < low + 4]


def test_whole_rows_of_a_stretch_stay_one_part():
    rows = Overlap((100, 8), 0, (8, 1), 0, (16, 1))
    parts = list(restrict(rows, 16 * 10 + 4, 16 * 90 + 4))
    assert [part.sizes for part in parts] == [(4,), (79, 8), (4,)]


def pairs(overlap: Overlap) -> list[tuple[int, int]]:
    """Target and source index of every element."""
    return [
        (
            overlap.target_start + sum(map(int.__mul__, index, overlap.target_strides)),
            overlap.source_start + sum(map(int.__mul__, index, overlap.source_strides)),
        )
        for index in itertools.product(*map(range, overlap.sizes))
    ]
