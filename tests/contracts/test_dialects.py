"""What every dialect of every family promises: there and back, and nothing is lost or invented.

A family is found by its file, its small models by ``tiny_configs()`` of its test file, as in
``test_families.py``. Weights count upwards through the whole model, so that no two elements are
alike; they go from one dialect to another and back, whole and in pieces of any shape.
"""

import dataclasses
import importlib.util
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("transformers")

from hypothesis import given, settings
from hypothesis import strategies as st

from bioinit import contexts, families
from bioinit.config import TrainableModelConfig
from bioinit.contexts.protocol import Context
from bioinit.errors import ConfigError
from bioinit.families.protocol import Family, ReadFields
from bioinit.layout import Box, Dims, intersect, numel, row_major
from bioinit.mapping import Mapping as Table
from bioinit.merge import merge
from bioinit.record import build, make_record
from bioinit.rules import Rule
from bioinit.save.beside import beside
from bioinit.storage import Folder

TESTS = Path(__file__).parents[1] / "families"
NAMES = [name for name in families.names() if (TESTS / f"test_{name}.py").exists()]
WAYS = (2, 4, 8)
Tensors = dict[str, torch.Tensor]


class Piece(NamedTuple):
    """A part of a stored tensor: the key, where the part lies in it, and its own memory."""

    key: str
    offsets: Dims
    memory: torch.Tensor


def tiny(name: str) -> dict[str, dict]:
    spec = importlib.util.spec_from_file_location(f"tests_of_{name}", TESTS / f"test_{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.tiny_configs() if hasattr(module, "tiny_configs") else {}


def settled(cls: type[TrainableModelConfig], read: ReadFields, **written: Any) -> Any:
    result = merge(make_record(cls, written, {}, at="model"), read.fields, {})
    assert not result.problems, [str(problem) for problem in result.problems]
    return build(result.record, at="model")


def from_hf(family: Family, data: dict, **written: Any) -> Any:
    context = Context("hf", "config.json", data, data["model_type"])
    return settled(family.config_for(context), family.read_fields(context), **written)


def variants(family: Family, data: dict) -> Iterator[tuple[str, Any]]:
    """The config, and others that differ in what changes layouts."""
    config = from_hf(family, data)
    yield "", config
    fields = {field.name for field in dataclasses.fields(config)}
    if "num_query_groups" in fields:
        for groups in {1, 2, config.num_attention_heads} - {config.num_query_groups}:
            yield f"groups{groups}", dataclasses.replace(config, num_query_groups=groups)
    if "share_embeddings_and_output_weights" in fields:
        tied = not config.share_embeddings_and_output_weights
        yield (
            "tied" if tied else "untied",
            dataclasses.replace(config, share_embeddings_and_output_weights=tied),
        )
    if "make_vocab_size_divisible_by" in fields:
        yield "padded", dataclasses.replace(config, make_vocab_size_divisible_by=101)


def cases() -> Iterator[tuple[str, str, Any]]:
    for name in NAMES:
        family = families.load(name)
        if not family.dialects or family.tensors is None:
            continue
        for number, (which, data) in enumerate(tiny(name).items()):
            for variant, config in variants(family, data):
                if variant and number:
                    break
                if family.tensors(config):
                    yield f"{name}-{which}{'-' if variant else ''}{variant}", name, config


CASES = {case: (name, config) for case, name, config in cases()}


def distinct(family: Family, config: Any) -> list[str]:
    """Dialects with a table of their own: what holds of one holds of those that share it."""
    found: dict[tuple[Rule, ...], str] = {}
    for dialect, declared in family.dialects.items():
        found.setdefault(tuple(declared.rules(config, {}, "")), dialect)
    return list(found.values())


PAIRS = [
    (case, *pair)
    for case, (name, config) in CASES.items()
    for pair in itertools.permutations(distinct(families.load(name), config), 2)
]
each_case = pytest.mark.parametrize("case", CASES)
each_pair = pytest.mark.parametrize(("case", "one", "other"), PAIRS)


def canonical(family: Family, config: Any) -> Tensors:
    """Every canonical tensor, filled with numbers that no other element has."""
    assert family.tensors is not None
    first, found = 1, {}
    for key, tensor in family.tensors(config).items():
        size = numel(tensor.shape)
        found[key] = torch.arange(first, first + size, dtype=torch.float64).view(tensor.shape)
        first += size
    return found


def body(family: Family, config: Any) -> str:
    return family.body(config) if family.body is not None else ""


def table(family: Family, dialect: str, config: Any, shapes: Mapping[str, Dims]) -> Table:
    return Table(family.dialects[dialect].rules(config, shapes, body(family, config)))


def spelled(family: Family, dialect: str, config: Any, tensors: Tensors) -> dict[str, Dims]:
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return table(family, dialect, config, {}).spelled_out(shapes)


def moved(source: Table, pieces: list[Piece], target: Table, wanted: list[Piece]) -> None:
    """Fill the memory of ``wanted`` from ``pieces``; it stays NaN where nothing lands."""
    held: dict[str, list[tuple[Any, torch.Tensor]]] = {}
    for piece in pieces:
        for placed in source.place(piece.key, (box_of(piece),)) or ():
            held.setdefault(placed.key, []).append((placed, piece.memory.flatten()))
    for piece in wanted:
        flat = piece.memory.view(-1)
        for placed in target.place(piece.key, (box_of(piece),)) or ():
            for found, memory in held.get(placed.key, ()):
                overlap = intersect(found.box, placed.box)
                if overlap is None:
                    continue
                at = torch.as_strided(
                    flat, overlap.sizes, overlap.target_strides, overlap.target_start
                )
                value = torch.as_strided(
                    memory, overlap.sizes, overlap.source_strides, overlap.source_start
                )
                assert at.isnan().all(), f"{piece.key} is written twice"
                at.copy_(value + (found.add - placed.add))


def box_of(piece: Piece) -> Box:
    shape = tuple(piece.memory.shape)
    return Box(piece.offsets, shape, 0, row_major(shape))


def whole(tensors: Tensors) -> list[Piece]:
    return [Piece(key, (0,) * t.dim(), t.contiguous()) for key, t in tensors.items()]


def empty(shapes: Mapping[str, Dims]) -> Tensors:
    return {key: torch.full(s, torch.nan, dtype=torch.float64) for key, s in shapes.items()}


def cut(tensors: Tensors, cuts: Mapping[str, list[list[int]]]) -> list[Piece]:
    """``tensors`` in boxes with memory of their own: per key and dim, where parts begin (and 0)."""
    found = []
    for key, tensor in tensors.items():
        edges = [
            sorted({0, size, *(c for c in given if c < size)})
            for size, given in zip(tensor.shape, cuts[key], strict=True)
        ]
        for corner in itertools.product(*(itertools.pairwise(e) for e in edges)):
            part = tensor[tuple(slice(low, high) for low, high in corner)]
            found.append(
                Piece(
                    key,
                    tuple(low for low, _ in corner),
                    part.clone(memory_format=torch.contiguous_format),
                )
            )
    return found


def glued(shapes: Mapping[str, Dims], pieces: list[Piece]) -> Tensors:
    found = empty(shapes)
    for piece in pieces:
        sizes = piece.memory.shape
        region = tuple(slice(o, o + s) for o, s in zip(piece.offsets, sizes, strict=True))
        found[piece.key][region] = piece.memory
    return found


def same(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor.nan_to_num(nan=-1), other[key].nan_to_num(nan=-1)), key


def stored_as(family: Family, dialect: str, config: Any, tensors: Tensors) -> Tensors:
    """The tensors of a checkpoint in ``dialect``; padding is NaN."""
    found = empty(spelled(family, dialect, config, tensors))
    shapes = {key: tuple(t.shape) for key, t in found.items()}
    moved(
        Table.identity(),
        whole(tensors),
        table(family, dialect, written_in(family, dialect, config), shapes),
        whole(found),
    )
    return found


def written_in(family: Family, dialect: str, config: Any) -> Any:
    """The config as a checkpoint that is written in ``dialect`` describes itself."""
    if hasattr(config, "layernorm_zero_centered_gamma"):
        return dataclasses.replace(config, layernorm_zero_centered_gamma=True)
    return config


@each_case
def test_a_dialect_has_every_needed_tensor_once_and_whole(case):
    name, config = CASES[case]
    family = families.load(name)
    assert family.tensors is not None
    tensors = canonical(family, config)
    needed = {key: t for key, t in tensors.items() if family.tensors(config)[key].kind == "needed"}
    for dialect in family.dialects:
        stored = stored_as(family, dialect, config, tensors)
        back = empty({key: tuple(tensor.shape) for key, tensor in needed.items()})
        shapes = {key: tuple(t.shape) for key, t in stored.items()}
        moved(table(family, dialect, config, shapes), whole(stored), Table.identity(), whole(back))
        same(back, needed)


@each_pair
def test_weights_come_back_bit_for_bit(case, one, other):
    name, config = CASES[case]
    family = families.load(name)
    tensors = common(family, config, one, other)
    stored = stored_as(family, one, config, tensors)
    there = stored_as(family, other, config, tensors)
    tables = {
        dialect: table(family, dialect, config, {k: tuple(t.shape) for k, t in held.items()})
        for dialect, held in ((one, stored), (other, there))
    }
    found = empty({key: tuple(tensor.shape) for key, tensor in there.items()})
    moved(tables[one], whole(stored), tables[other], whole(found))
    same(found, there)
    for ways in WAYS:
        sliced = sliced_for(stored, ways)
        pieces = [p._replace(memory=torch.full_like(p.memory, torch.nan)) for p in sliced]
        moved(tables[other], sliced_for(found, ways), tables[one], pieces)
        same(glued({k: tuple(t.shape) for k, t in stored.items()}, pieces), stored)


def common(family: Family, config: Any, *dialects: str) -> Tensors:
    """Canonical tensors that all of ``dialects`` have."""
    tensors = canonical(family, config)
    for dialect in dialects:
        known = table(family, dialect, config, {})
        tensors = {k: t for k, t in tensors.items() if known.spelled_out({k: tuple(t.shape)})}
    return tensors


def sliced_for(tensors: Tensors, ways: int) -> list[Piece]:
    """Equal slices, as so many ranks have them, along a dim that differs from tensor to tensor."""
    cuts = {}
    for number, (key, tensor) in enumerate(tensors.items()):
        step = [max(size // ways, 1) for size in tensor.shape]
        cuts[key] = [
            list(range(0, size, step[dim])) if dim == number % max(tensor.dim(), 1) else []
            for dim, size in enumerate(tensor.shape)
        ]
    return cut(tensors, cuts)


@settings(max_examples=2, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize(("case", "one", "other"), [p for p in PAIRS if p[1] < p[2]])
def test_uneven_pieces_make_the_same_whole(case, one, other, data):
    name, config = CASES[case]
    family = families.load(name)
    tensors = common(family, config, one, other)
    stored = stored_as(family, one, config, tensors)
    there = stored_as(family, other, config, tensors)

    def shattered(held: Tensors) -> list[Piece]:
        seed = data.draw(st.integers(0, 2**16))
        generator = torch.Generator().manual_seed(seed)
        cuts = {
            key: [torch.randint(0, size, (2,), generator=generator).tolist() for size in t.shape]
            for key, t in held.items()
        }
        return cut(held, cuts)

    wanted = [p._replace(memory=torch.full_like(p.memory, torch.nan)) for p in shattered(there)]
    moved(
        table(family, one, config, {k: tuple(t.shape) for k, t in stored.items()}),
        shattered(stored),
        table(family, other, config, {k: tuple(t.shape) for k, t in there.items()}),
        wanted,
    )
    same(glued({k: tuple(t.shape) for k, t in there.items()}, wanted), there)


def read_back(family: Family, dialect: str, config: Any, written: Any, folder: Path) -> ReadFields:
    """What the files that a dialect wrote say, read as somebody else's checkpoint."""
    for name, content in written.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    context = contexts.find((Folder.at(folder),))
    assert context is not None and context.dialect == dialect
    assert family.dialects[dialect].recognizes(context)
    shapes = spelled(family, dialect, config, canonical(family, config))
    result = family.read_fields(context, {f"{written.front}{k}": s for k, s in shapes.items()})
    told = {entry.name for entry in result.account}
    assert set(context.data) <= told, set(context.data) - told
    assert all(entry.note for entry in result.account)
    return result


def writers() -> Iterator[tuple[str, str]]:
    for case, (name, _) in CASES.items():
        for dialect, found in families.load(name).dialects.items():
            if found.write is not None:
                yield case, dialect


@pytest.mark.parametrize(("case", "dialect"), list(writers()))
def test_fields_come_back_from_what_was_written(case, dialect, tmp_path):
    name, config = CASES[case]
    family = families.load(name)
    write = family.dialects[dialect].write
    assert write is not None
    found = family.dialects[dialect]
    try:
        side = beside(found, dialect, config, None, fields={}, files={}, homes=())
    except ConfigError as refused:
        assert "cannot express" in str(refused) and dialect in str(refused)
        return
    written = side.written._replace(files=side.made)
    assert found.says == {one for ours in found.fields.values() for one in ours.split(", ") if one}
    result = read_back(family, dialect, config, written, tmp_path)
    again = settled(type(config), result, architecture=config.architecture)
    for field in dataclasses.fields(config):
        if field.name not in ("extra", "architecture"):
            assert getattr(again, field.name) == getattr(config, field.name), field.name
    carried = {
        entry.name: json_of(written, entry.name, result)
        for entry in result.account
        if entry.fate == "carried" and dialect != "hf"
    }
    assert write(again if dialect != "hf" else config, carried, ()).files == side.written.files


def json_of(written: Any, name: str, result: ReadFields) -> Any:
    raise AssertionError(f"{name} was written, and nothing of ours means it")


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES.values()}))
def test_each_family_can_be_written_in_every_dialect_that_is(name):
    family = families.load(name)
    configs = [config for other, config in CASES.values() if other == name]
    for dialect, found in family.dialects.items():
        if found.write is not None:
            assert any(writes(found.write, config) for config in configs), dialect


def writes(write: Any, config: Any) -> bool:
    try:
        return bool(write(config, {}, ()).files)
    except ConfigError:
        return False


@each_case
def test_what_only_one_world_knows_is_carried_there_and_back(case):
    name, config = CASES[case]
    family = families.load(name)
    for dialect, found in family.dialects.items():
        if found.write is None or not writes(found.write, config):
            continue
        written = found.write(config, {"a_field_of_tomorrow": 7}, ())
        shown = next(c for p, c in written.files.items() if p.endswith((".json", ".yml")))
        assert b"a_field_of_tomorrow" in shown, dialect
        if dialect == "hf":
            assert json.loads(shown)["a_field_of_tomorrow"] == 7
