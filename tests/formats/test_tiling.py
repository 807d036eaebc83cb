"""Whether chunks fill a tensor, held against counting every element."""

import itertools
import random
import time

import pytest

from bioinit.formats._tiling import fault


def counted(shape, spans) -> bool:
    """Whether every element lies in exactly one of ``spans``, which all lie inside."""
    if any(o + n > w for at, size in spans for o, n, w in zip(at, size, shape, strict=True)):
        return False
    held: dict[tuple[int, ...], int] = {}
    for at, size in spans:
        for place in itertools.product(*(range(o, o + n) for o, n in zip(at, size, strict=True))):
            held[place] = held.get(place, 0) + 1
    return all(held.get(place, 0) == 1 for place in itertools.product(*map(range, shape)))


def cut(chance, at, shape, depth):
    if not depth or not shape or chance.random() < 0.2:
        return [(at, shape)]
    dim = chance.randrange(len(shape))
    here = chance.randrange(shape[dim] + 1)
    low = (*shape[:dim], here, *shape[dim + 1 :])
    high = (*shape[:dim], shape[dim] - here, *shape[dim + 1 :])
    begin = (*at[:dim], at[dim] + here, *at[dim + 1 :])
    return cut(chance, at, low, depth - 1) + cut(chance, begin, high, depth - 1)


def spoil(chance, spans):
    """The same with one span left out, doubled, or larger or smaller by one."""
    which, way = chance.randrange(len(spans)), chance.randrange(3)
    if way == 0:
        return spans[:which] + spans[which + 1 :]
    at, size = spans[which]
    if way == 1 or not size:
        return [*spans, spans[which]]
    dim = chance.randrange(len(size))
    changed = (*size[:dim], max(0, size[dim] + chance.choice((-1, 1))), *size[dim + 1 :])
    return [*spans[:which], (at, changed), *spans[which + 1 :]]


@pytest.mark.parametrize("seed", range(0, 1000, 100))
def test_says_the_same_as_counting_every_element(seed):
    right = wrong = 0
    for chance in map(random.Random, range(seed, seed + 100)):
        shape = tuple(chance.randrange(1, 5) for _ in range(chance.randrange(4)))
        spans = cut(chance, (0,) * len(shape), shape, chance.randrange(6))
        if chance.random() < 0.6:
            spans = spoil(chance, spans)
        chance.shuffle(spans)
        fills = counted(shape, spans)
        assert (fault(shape, spans) is None) == fills, (shape, spans)
        right, wrong = right + fills, wrong + (not fills)
    assert right > 10 and wrong > 10


def test_chunks_that_no_plane_separates_are_compared_with_each_other():
    wheel = [((0, 0), (2, 3)), ((0, 3), (3, 2)), ((3, 2), (2, 3)), ((2, 0), (3, 2))]
    assert fault((5, 5), [*wheel, ((2, 2), (1, 1))]) is None
    assert fault((5, 5), wheel) == (
        "no chunk holds 1 elements of the part at (0, 0) of size (5, 5)"
    )


MANY = 20_000


@pytest.mark.parametrize(
    ("shape", "spans"),
    [
        ((MANY,), [((0,), (MANY,))] * MANY),
        ((MANY + 5, MANY + 5), [((i, i), (5, 5)) for i in range(MANY)]),
        (
            (1 << 40, 1 << 40),
            [
                ((i, i), (1, (1 << 40) - i)) if i % 2 else ((i, i), ((1 << 40) - i, 1))
                for i in range(MANY)
            ],
        ),
        ((2,) * 64, [((0,) * 63 + (i % 2,), (2,) * 63 + (1,)) for i in range(MANY)]),
    ],
    ids=["all the same", "stairs", "spiral", "64 dims"],
)
def test_no_list_of_chunks_takes_long_to_refuse(shape, spans):
    begin = time.process_time()
    assert fault(shape, spans) is not None
    assert time.process_time() - begin < 3
