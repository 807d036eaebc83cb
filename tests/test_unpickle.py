"""The closed unpickler: what it builds, what it keeps inert, and what nobody gets it to do."""

import argparse
import collections
import datetime
import decimal
import enum
import functools
import os
import pathlib
import pickle
import random
import struct
import sys
import tracemalloc
import types

import numpy
import pytest
import torch

from bioinit.errors import CheckpointError, CorruptCheckpoint, RefusedCheckpoint
from bioinit.unpickle import (
    SYMBOLS,
    Opaque,
    Refused,
    StorageRef,
    Symbol,
    TensorRef,
    Truncated,
    find_weights,
    load,
    load_next,
    plain,
)

PROTOCOLS = range(6)


class Thing:
    """A class that is on no list."""

    def __init__(self, **fields) -> None:
        self.__dict__.update(fields)


class Slotted:
    __slots__ = ("a",)

    def __init__(self, a) -> None:
        self.a = a


class Settings(dict):
    pass


class Names(list):
    pass


class Color(enum.Enum):
    RED = 1


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *args, state=None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


# Plain values


PLAIN = [
    None,
    True,
    False,
    0,
    255,
    65535,
    -1,
    1 << 31,
    -(1 << 40),
    1 << 200,
    -(1 << 900),
    1.5,
    float("inf"),
    "",
    "text",
    "ünïcödé",
    "x" * 300,
    "lone \ud800",
    b"",
    b"\x00\xff",
    b"x" * 300,
    (),
    (1,),
    (1, 2),
    (1, 2, 3),
    (1, 2, 3, 4),
    [],
    [1],
    list(range(2500)),
    {},
    {"a": 1},
    {i: str(i) for i in range(2500)},
    {(1, "a"): [None], 2.5: b"x", None: True},
    {1, 2, 3},
    set(),
    frozenset((1, 2)),
    frozenset(),
    complex(1, -2),
    range(1, 10, 2),
    datetime.datetime(2024, 2, 29, 12, 30, 1, 5),
    datetime.datetime(2024, 2, 29, tzinfo=datetime.UTC),
    datetime.date(2024, 2, 29),
    datetime.time(1, 2, 3),
    datetime.timedelta(days=1, seconds=2),
    decimal.Decimal("1.25"),
    bytearray(b"abc"),
    torch.float32,
    torch.strided,
    [[["deep"]], {"x": ({"y": [1]},)}],
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", PLAIN, ids=lambda v: repr(v)[:30])
def test_plain_values_come_out_as_they_went_in(value, protocol):
    if isinstance(value, torch.layout):
        expected = "torch.strided"  # torch asks a function of its own for it, by name
    else:
        expected = value
    data = pickle.dumps({"value": value, "again": value}, protocol)
    found = load(data)
    if value is torch.strided:
        assert str(found["value"]) == expected
        return
    assert found == {"value": expected, "again": expected}
    assert type(found["value"]) is type(expected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ordinary_containers_of_the_library_become_plain_ones(protocol):
    ordered = collections.OrderedDict(a=1, b=2)
    ordered._metadata = {"version": 1}
    default = collections.defaultdict(list, {"a": [1]})
    value = (ordered, default, collections.Counter("aab"), collections.deque([1, 2]))
    assert load(pickle.dumps(value, protocol)) == (
        {"a": 1, "b": 2},
        {"a": [1]},
        {"a": 2, "b": 1},
        [1, 2],
    )


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shared_and_cyclic_values_stay_shared_and_cyclic(protocol):
    inner = [1]
    cycle: dict[str, object] = {"inner": inner, "again": inner}
    cycle["self"] = cycle
    found = load(pickle.dumps(cycle, protocol))
    assert found["self"] is found and found["inner"] is found["again"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_paths_devices_sizes_and_numpy_numbers_become_plain(protocol):
    value = {
        "path": pathlib.PurePosixPath("/a/b"),
        "device": torch.device("cuda", 1),
        "size": torch.Size([2, 3]),
        "int": numpy.int64(7),
        "float": numpy.float32(1.5),
        "bool": numpy.bool_(True),
    }
    assert load(pickle.dumps(value, protocol)) == {
        "path": pathlib.PurePosixPath("/a/b"),
        "device": "cuda:1",
        "size": (2, 3),
        "int": 7,
        "float": 1.5,
        "bool": True,
    }


def test_text_of_python_2_is_read():
    assert load(b"\x80\x02}q\x00U\x01aq\x01T\x02\x00\x00\x00bcq\x02s.") == {"a": "bc"}
    assert load(b"S'it\\'s'\n.") == "it's"
    assert load(b"(I01\nI7\nL8L\nF1.5\nVx\\u00fc\nt.") == (True, 7, 8, 1.5, "x\u00fc")
    assert load(b"\x80\x02c__builtin__\nset\nq\x00]q\x01(K\x01K\x02e\x85Rq\x02.") == {1, 2}


# Inert objects


def assert_opaque(value, module, name):
    assert type(value) is Opaque and (value.module, value.name) == (module, name)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_object_of_an_unlisted_class_keeps_its_state(protocol):
    found = load(pickle.dumps([Thing(a=1, b=Thing(c=2)), argparse.Namespace(x=3)], protocol))
    assert_opaque(found[0], __name__, "Thing")
    assert found[0].state["a"] == 1 and found[0].state["b"].state == {"c": 2}
    assert_opaque(found[1], "argparse", "Namespace")
    assert found[1].state == {"x": 3}


@pytest.mark.parametrize("protocol", range(2, 6))
def test_slots_and_simple_namespaces_keep_their_state_too(protocol):
    found = load(pickle.dumps([Slotted(5), types.SimpleNamespace(y=6)], protocol))
    assert_opaque(found[0], __name__, "Slotted")
    assert [one.state for one in found] == [{"a": 5}, {"y": 6}]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_kinds_of_dict_and_list_keep_their_items(protocol):
    found = load(pickle.dumps([Settings(a=1), Names("xy")], protocol))
    assert found[0].items == {"a": 1} and found[1].items == ["x", "y"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_class_or_function_that_is_only_named_is_only_a_name(protocol):
    found = load(pickle.dumps([Thing, os.system, collections.OrderedDict], protocol))
    assert [type(one) for one in found] == [Symbol] * 3
    assert [repr(one) for one in found][1:] == ["posix.system", "collections.OrderedDict"]


def test_nested_classes_are_names_with_dots():
    data = b"\x80\x04\x8c\x02os\x8c\x0cpath.sys.foo\x93)\x81."
    assert_opaque(load(data), "os", "path.sys.foo")


def test_a_partial_is_inert_and_what_it_would_call_is_a_name():
    found = load(pickle.dumps(functools.partial(os.system, "true")))
    assert_opaque(found, "functools", "partial")
    assert repr(found.args[0]) == "posix.system"


def test_members_of_known_enumerations_keep_their_value():
    data = b"\x80\x02cmegatron.core.transformer.enums\nAttnBackend\nK\x05\x85R."
    found = load(data)
    assert_opaque(found, "megatron.core.transformer.enums", "AttnBackend")
    assert found.state == 5


def test_members_of_classes_by_name_are_inert():
    data = b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93\x8c\x01m\x8c\x05Color\x93\x8c\x03RED\x86R."
    found = load(data)
    assert_opaque(found, "m", "Color")
    assert found.state == "RED"


def test_an_object_may_be_the_key_of_a_dict():
    """Torch's distributed checkpoints index their storages by objects."""
    found = load(pickle.dumps({Thing(name="w", offset=0): 1, Thing: 2}))
    assert [type(key) for key in found] == [Opaque, Symbol]
    assert next(iter(found)).state == {"name": "w", "offset": 0}


def test_the_list_of_symbols_can_be_extended():
    data = pickle.dumps(Calls(divmod, 7, 2))
    assert isinstance(load(data), Refused)
    more = {**SYMBOLS, ("builtins", "divmod"): Symbol("builtins", "divmod", lambda a, b: (a, b))}
    assert load(data, symbols=more) == (7, 2)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_metadata_of_a_distributed_checkpoint_is_readable(tmp_path):
    import torch.distributed.checkpoint as dcp

    dcp.save({"w": torch.ones(2, 3), "n": 5}, checkpoint_id=tmp_path / "x")
    found = load((tmp_path / "x" / ".metadata").read_bytes())
    stored = found.state["state_dict_metadata"]["w"].state
    assert stored["size"] == (2, 3)
    assert [chunk.state for chunk in stored["chunks"]] == [{"offsets": (0, 0), "sizes": (2, 3)}]
    assert stored["properties"].state[0] is torch.float32
    places = {key.state["fqn"]: value.state for key, value in found.state["storage_data"].items()}
    assert places["w"]["relative_path"] == "__0_0.distcp"
    assert "refused" not in str(plain(found))


def test_nothing_in_metadata_that_megatron_wrote_is_refused(fixtures_dir):
    files = sorted(fixtures_dir.rglob(".metadata"))
    assert files
    for file in files:
        assert "refused" not in str(plain(load(file.read_bytes())))


# Calls


HOSTILE = {
    "os.system": Calls(os.system, "touch {trace}"),
    "eval": Calls(eval, "open({trace!r}, 'w')"),
    "exec": Calls(exec, "open({trace!r}, 'w')"),
    "getattr": Calls(getattr, os, "system"),
    "import": Calls(__import__, "antigravity"),
    "open": Calls(open, "{trace}", "w"),
    "partial": Calls(functools.partial(os.system, "touch {trace}")),
    "state": Calls(os.system, "true", state={"a": 1}),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", [n for n in HOSTILE if n not in ("getattr", "partial")])
def test_a_call_is_never_made(name, protocol, tmp_path):
    trace = tmp_path / "ran"
    function, args = HOSTILE[name].reduced[:2]
    args = tuple(
        a.replace("{trace!r}", repr(str(trace))).replace("{trace}", str(trace)) for a in args
    )
    data = pickle.dumps({"x": Calls(function, *args)}, protocol)
    loaded = set(sys.modules)
    found = load(data)["x"]
    assert type(found) is Refused and found.name == function.__name__
    assert not trace.exists()
    assert set(sys.modules) == loaded


RAW = {
    "INST": b"(S'touch TRACE'\niposix\nsystem\n.",
    "OBJ": b"(cposix\nsystem\nS'touch TRACE'\no.",
    "NEWOBJ_EX": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0btouch TRACE\x85}\x92.",
    "dotted": b"\x80\x04\x8c\x05posix\x8c\x0fsystem.__call__\x93\x8c\x0btouch TRACE\x85R.",
    "getattr of a listed class": (
        b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93\x8c\x0bcollections\x8c\x0bOrderedDict\x93"
        b"\x8c\x08__init__\x86R\x8c\x01x\x85R."
    ),
    "call of what a refused call gives": b"cbuiltins\n__import__\n(S'os'\ntR(S'x'\ntR.",
    "call of an inert object": b"\x80\x02cm\nThing\n)\x81K\x01\x85R.",
    "call of a dtype": b"\x80\x02ctorch\nfloat32\n)R.",
    "call of a number": b"\x80\x02K\x01)R.",
    "state for a listed class": b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.",
    "state for a listed function": b"ctorch._utils\n_rebuild_tensor_v2\nN}S'__code__'\nI1\ns\x86b.",
    "slots for a listed class": b"cpathlib\nPurePosixPath\n(N}S'__reduce__'\nI1\nstb.",
    "items for a class": b"ccollections\nOrderedDict\n(S'a'\nI1\nu.",
    "items for a list": b"](S'a'\nI1\nu.",
    "extension registry": b"\x80\x02\x82\x01.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "persistent id that is text": b"Psomething\n.",
}


@pytest.mark.parametrize("name", RAW)
def test_no_operation_reaches_python(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = vars(pathlib.PurePosixPath).get("__reduce__"), set(sys.modules)
    try:
        found = load(RAW[name])
    except CheckpointError:
        pass
    else:
        assert type(found) in (Refused, Opaque, Symbol)
    assert not (tmp_path / "TRACE").exists()
    assert (vars(pathlib.PurePosixPath).get("__reduce__"), set(sys.modules)) == before


def test_the_symbols_are_not_changed_by_a_pickle():
    before = {key: (type(s), repr(s), getattr(s, "build", None)) for key, s in SYMBOLS.items()}
    for data in RAW.values():
        try:
            load(data)
        except CheckpointError:
            continue
    assert {k: (type(s), repr(s), getattr(s, "build", None)) for k, s in SYMBOLS.items()} == before


def test_a_tensor_that_depends_on_a_call_refuses_the_file():
    storage = ("storage", torch.FloatStorage, "0", "cpu", 4)
    rebuild = torch._utils._rebuild_tensor_v2
    for args in (
        (Calls(os.getpid), 0, (2,), (1,), False, {}),
        (storage, Calls(os.getpid), (2,), (1,), False, {}),
        (storage, 0, Calls(os.getpid), (1,), False, {}),
    ):
        with pytest.raises(RefusedCheckpoint, match=r"posix\.getpid.*save the plain state dict"):
            load(tensor_pickle(Calls(rebuild, *args)))
    with pytest.raises(RefusedCheckpoint, match=r"posix\.getpid"):
        load(tensor_pickle(Calls(rebuild, (*storage[:4], Calls(os.getpid)), 0, (2,), (1,), 0, {})))
    with pytest.raises(RefusedCheckpoint, match="a name in the pickle"):
        load(pickle.dumps(KeyOf(Calls(os.getpid), 1)))


class KeyOf:
    """A dict with a key that a call would give."""

    def __init__(self, key, value) -> None:
        self.pair = (key, value)

    def __reduce__(self):
        return dict, (), None, None, iter([self.pair])


def tensor_pickle(value) -> bytes:
    import io

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return obj if type(obj) is tuple and obj[:1] == ("storage",) else None

    stream = io.BytesIO()
    Pickler(stream, 2).dump(value)
    return stream.getvalue()


def test_a_tensor_is_a_plain_description():
    storage = ("storage", torch.HalfStorage, "7", "cuda:0", 10)
    data = tensor_pickle(Calls(torch._utils._rebuild_tensor_v2, storage, 4, (2, 3), (3, 1), 0, {}))
    assert load(data) == TensorRef(
        StorageRef("7", torch.float16, 10), torch.float16, 4, (2, 3), (3, 1)
    )


def test_lazily_negated_tensors_are_refused():
    storage = ("storage", torch.HalfStorage, "7", "cuda:0", 10)
    args = (storage, 0, (2,), (1,), False, {}, {"neg": True})
    with pytest.raises(RefusedCheckpoint, match="lazy marks"):
        load(tensor_pickle(Calls(torch._utils._rebuild_tensor_v2, *args)))


# Bounds


def test_a_huge_number_to_remember_under_is_corrupt():
    for data in (b"\x80\x02Nr\xff\xff\xff\xff.", b"Np4000000000\n.", b"Np-1\n.", b"Ng-1\n."):
        with pytest.raises(CorruptCheckpoint):
            load(data)


@pytest.mark.parametrize("op", [b"X", b"T", b"B", b"\x8b"])
def test_lengths_beyond_the_pickle_are_truncation_and_nothing_is_allocated(op):
    with pytest.raises(Truncated):
        load(b"\x80\x02" + op + struct.pack("<i", 2**31 - 1) + b"x.")


@pytest.mark.parametrize("op", [b"\x8d", b"\x8e", b"\x96"])
def test_long_lengths_beyond_the_pickle_are_truncation_too(op):
    with pytest.raises(Truncated):
        load(b"\x80\x05" + op + struct.pack("<Q", 2**63) + b"x.")


def test_numbers_without_end_are_corrupt():
    for data in (
        b"I" + b"9" * 5000 + b"\n.",
        b"L" + b"9" * 5000 + b"L\n.",
        b"\x80\x02\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000 + b".",
    ):
        with pytest.raises(CorruptCheckpoint, match="number of"):
            load(data)


def test_copies_of_copies_are_corrupt():
    """A megabyte of pickle must not become a terabyte of lists."""
    items = b"(" + b"K\x01" * 50_000 + b"l"
    copy = b"c__builtin__\nset\nh\x00\x85R0"
    with pytest.raises(CorruptCheckpoint, match="impossible"):
        load(b"\x80\x02" + items + b"q\x00" + copy * 10_000 + b".")
    with pytest.raises(CheckpointError):
        load(b"c__builtin__\nlist\n(c__builtin__\nrange\n(I0\nL10000000000000L\nI1\ntRtR(tR.")


def test_deep_nesting_is_read_or_corrupt_but_never_a_crash():
    depth = 200_000
    nested = b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."
    value = load(nested)
    with pytest.raises(CorruptCheckpoint, match="nested without end"):
        find_weights({"a": value, "w": None}, "x.pt")
    assert "..." in str(plain(value))


def test_a_deep_tuple_cannot_be_a_key():
    deep = b"N" + b"\x85" * 200_000
    for data in (b"\x80\x02}" + deep + b"Ns.", b"\x80\x04\x8f(" + deep + b"\x90."):
        with pytest.raises(CorruptCheckpoint, match="a key is a tuple"):
            load(data)


def bomb(empty: bytes, fill: bytes, depth: int = 60, width: int = 2) -> bytes:
    """A value of few bytes that holds ``width ** depth`` items."""
    made = b"(K\x01t" if fill == b"t" else empty + b"K\x01a"
    for index in range(depth):
        put = b"q" + bytes([index])
        start = b"(" if fill == b"t" else empty + b"("
        made += put + b"0" + start + (b"h" + bytes([index])) * width + fill
    return made


TUPLES, LISTS = bomb(b"", b"t"), bomb(b"]", b"e")
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n%sX\x03\x00\x00\x00cpuK\x04tQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n("


@pytest.mark.parametrize(
    "value",
    [
        b"}" + TUPLES + b"Ns",
        b"\x8f(" + TUPLES + b"\x90",
        b"}(" + TUPLES + b"t" + b"Ns",
        LISTS + b"Q",
        TUPLES + b"Q",
        STORAGE % LISTS,
        b"ctorch\ndevice\n(" + LISTS + b"K\x00tR",
        b"c_codecs\nencode\n(X\x01\x00\x00\x00a" + LISTS + b"tR",
        TENSOR + STORAGE % b"X\x01\x00\x00\x000" + b"K\x00K\x04\x85K\x01\x85\x89}" + LISTS + b"tR",
    ],
)
def test_what_means_an_enormous_value_is_never_rendered_or_hashed(value):
    with pytest.raises(CheckpointError) as caught:
        load(b"\x80\x04" + value + b".")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "key",
    [
        frozenset((1,)),
        decimal.Decimal(1),
        1j,
        1 << 64,
        (1 << 40, 1),
        (1.5, 2),
        tuple(range(9)),
        ((1, (2, 3)), tuple(range(6))),
        "x" * 20_000,
    ],
    ids=lambda key: repr(key)[:20],
)
def test_keys_whose_hashes_could_be_made_alike_are_corrupt(key):
    for value in ({key: 1}, {key}):
        with pytest.raises(CorruptCheckpoint, match="a key"):
            load(pickle.dumps(value))


def test_many_numbers_of_one_hash_are_corrupt_at_once():
    prime = sys.hash_info.modulus
    numbers = b"".join(
        b"\x8a\x0c" + (prime * n).to_bytes(12, "little") + b"N" for n in range(1, 60_000)
    )
    with pytest.raises(CorruptCheckpoint, match="a key is a number"):
        load(b"\x80\x02}(" + numbers + b"u.")


@pytest.mark.parametrize("item", ["é" * 500_000, "a" * 999_999, 1 << 4000, "é" * 9_000])
def test_one_large_value_that_is_shared_does_not_fill_the_plain_data(item):
    tracemalloc.start()
    found = plain([item] * 19_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(str(found)) < 6_000_000
    assert peak < 20_000_000


def test_a_small_pickle_that_means_an_enormous_tree_is_cut_off():
    value: object = [1]
    for _ in range(100):
        value = [value, value]
    found = load(pickle.dumps({"x": value}))
    assert len(str(plain(found))) < 1_000_000
    with pytest.raises(CorruptCheckpoint, match="nested without end"):
        find_weights(found, "x.pt")


def test_a_cycle_among_weights_is_corrupt():
    cycle: dict[str, object] = {}
    cycle["a"] = cycle
    assert plain(load(pickle.dumps(cycle)))
    with pytest.raises(CorruptCheckpoint, match="nested without end"):
        find_weights(load(pickle.dumps(cycle)), "x.pt")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_truncation_is_truncated_or_corrupt(protocol):
    data = pickle.dumps({"a": [1, 2.5, "text", b"bytes", (None, True)], "b": {1, 2}}, protocol)
    for end in range(len(data)):
        with pytest.raises(CorruptCheckpoint, match=r"x\.pt \(data\.pkl\)"):
            load(data[:end], where="x.pt (data.pkl)")


def test_what_breaks_off_says_so():
    data = pickle.dumps(["text" * 100], 2)
    for end in range(len(data)):
        with pytest.raises(Truncated):
            load(data[:end])


def test_any_bytes_at_all_give_a_value_or_an_error_of_ours():
    chance = random.Random(0)
    short = [value for value in PLAIN if len(repr(value)) < 500]
    seeds = [pickle.dumps((short, Settings(a=Thing(b=1))), protocol) for protocol in PROTOCOLS]
    for _ in range(3000):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            plain(load(bytes(data)))
        except CheckpointError:
            continue


def test_several_pickles_in_a_row_are_read_one_by_one():
    data = pickle.dumps([1], 2) + pickle.dumps("two", 4) + b"rest"
    first, end = load_next(data, 0)
    second, end = load_next(data, end)
    assert (first, second, data[end:]) == ([1], "two", b"rest")


# Plain data


def test_plain_data_is_what_any_json_writer_takes():
    import json

    value = {
        1: Thing(a=torch.float32, b=pathlib.PurePosixPath("/x")),
        "call": Calls(os.getpid),
        "items": (1, {2}, frozenset(), b"\x01", bytes(1000), 7),
        "named": os.system,
    }
    found = json.loads(json.dumps(plain(load(pickle.dumps(value)))))
    assert found == {
        "1": {"class": f"{__name__}.Thing", "state": {"a": "torch.float32", "b": "/x"}},
        "call": {"refused": "posix.getpid"},
        "items": [1, [2], [], "01", "1000 bytes", 7],
        "named": "posix.system",
    }


def test_half_characters_do_not_get_into_plain_data():
    found = plain(load(pickle.dumps({"\ud800": "\udfff", "ü": "ü"})))
    assert found == {"?": "?", "ü": "ü"}


def test_unlisted_members_of_enumerations_are_refused_by_name_only():
    found = load(pickle.dumps({"color": Color.RED, "epoch": 3}))
    assert found["epoch"] == 3
    assert plain(found)["color"] in (
        {"refused": f"{__name__}.Color"},
        {"class": f"{__name__}.Color", "state": "RED"},
    )


@pytest.mark.parametrize(
    "part",
    [
        *(b"]", b"}", b"\x8f", b"(", b"\x85", b")\x85", b"(l", b"(d", b"()\x91", b")R", b")\x81"),
        *(b"}K\1K\1s", b"}(K\1K\1u"),
    ],
    ids=repr,
)
def test_a_pickle_that_builds_far_more_than_it_is_long_is_corrupt(part):
    with pytest.raises(CorruptCheckpoint, match="far more objects"):
        load(b"\x80\x02(cx\ny\n" + part * 500_000 + b"l.")


@pytest.mark.parametrize("body", [b"]]", b"(]", b"(](", b"K\1(K\2", b"N(0]2"], ids=repr)
def test_a_pickle_that_leaves_something_at_its_end_is_corrupt(body):
    with pytest.raises(CorruptCheckpoint, match="more than one value"):
        load(b"\x80\x02" + body + b".")


@pytest.mark.parametrize("protocol", [2, 4])
def test_large_plain_values_of_an_optimizer_are_read(protocol):
    value = {
        "numbers": list(range(300_000)),
        "small": [n % 200 for n in range(2_000_000)],
        "pairs": [(n % 7, n % 200) for n in range(50_000)],
        "groups": [{"params": [n % 200], "lr": 0.5} for n in range(20_000)],
        "names": {f"layers.{n}.weight": [n] for n in range(100_000)},
    }
    assert load(pickle.dumps(value, protocol)) == value
