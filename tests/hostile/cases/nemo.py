"""`.nemo` archives: a tar can name any path, link anywhere and claim any size; gzip can explode."""

import gzip
import io
import os
import tarfile
import zlib
from pathlib import Path
from typing import Any

import torch

from tests.hostile.corpus import DAMAGED, REFUSED, Group, Target, canary
from tests.hostile.craft import (
    EXABYTE,
    STATE,
    TAR_END,
    YAML,
    Call,
    archive,
    nemo,
    pickled,
    saved,
    tar_header,
    tar_member,
    write_dcp,
    write_zarr,
)

GROUP = Group("nemo")
NAME = "model.nemo"


def lie(name: str, data: bytes, **said: Any) -> None:
    """An archive, pointed at by its folder and by itself."""

    def make(folder: Path) -> None:
        (folder / NAME).write_bytes(data)

    def pointed(folder: Path) -> str:
        make(folder)
        return NAME

    GROUP.add(name, make, **{"file": NAME, **said})
    GROUP.add(f"{name}_by_itself", pointed, **{"file": NAME, **said})


def member(name: str, *args: Any, **said: Any) -> None:
    """A good archive with one more member."""
    known = {key: said.pop(key) for key in ("link", "prefix") if key in said}
    lie(name, nemo(tar_member(*args, **known)), **said)


def record(key: str, value: str) -> bytes:
    """A record of an extended header, which gives its own length."""
    size = len(key) + len(value) + 3
    while size != len(str(size)) + len(key) + len(value) + 3:
        size = len(str(size)) + len(key) + len(value) + 3
    return f"{size} {key}={value}\n".encode()


def extended(name: str, *records: bytes, letter: bytes = b"x", **said: Any) -> None:
    data = b"".join(records)
    held = tar_member("./PaxHeaders/x", data, letter) + tar_member("./a", b"x")
    lie(name, nemo(held), **said)


def gnu(name: str, value: bytes, **said: Any) -> None:
    held = tar_member("././@LongLink", value, b"L") + tar_member("./a", b"x")
    lie(name, nemo(held), **said)


member("absolute_path", "/etc/evil", b"x", errors=REFUSED, says="/etc/evil")
member("path_leads_up", "../evil", b"x", errors=REFUSED, says="evil")
member("path_leads_up_from_inside", "./a/../../evil", b"x", errors=REFUSED, says="evil")
member("path_leads_up_in_the_prefix", "evil", b"x", prefix=b"..", errors=REFUSED, says="evil")
member("path_is_dots", "..", errors=REFUSED)
member("path_is_a_newline_and_an_escape", "./a\n\x1b[2Jb", b"x", kind="either")
member("path_has_backslashes", "..\\..\\evil", b"x", kind="either")
member("path_is_empty", "", b"x")
member("symbolic_link", "./a", b"", b"2", link=b"/etc/passwd", errors=REFUSED, says="link")
member(
    "symbolic_link_in_place_of_the_weights",
    "./model_weights.ckpt",
    b"",
    b"2",
    link=b"../secret",
    errors=REFUSED,
    says="link",
)
member("hard_link", "./a", b"", b"1", link=b"/etc/passwd", errors=REFUSED, says="link")
member("character_device", "./a", b"", b"3", errors=REFUSED, says="device")
member("block_device", "./a", b"", b"4", errors=REFUSED, says="device")
member("named_pipe", "./a", b"", b"6", errors=REFUSED, says="pipe")
member("sparse_file_of_gnu", "./a", b"x", b"S", errors=REFUSED, says="sparse")
member("continued_from_another_volume", "./a", b"x", b"M", errors=REFUSED)
member("unknown_kind", "./a", b"x", b"Q", errors=REFUSED)
member("folder_with_contents", "./a/", b"x", b"5", errors=DAMAGED, says="a")
member("config_stands_twice", "./model_config.yaml", YAML, errors=DAMAGED, says="twice|two|again")
member("config_stands_twice_in_other_words", "model_config.yaml", YAML, errors=DAMAGED)
member("weights_stand_twice", "./x/.././model_weights.ckpt", b"x", errors=REFUSED + "|" + DAMAGED)
member(
    "file_that_is_a_folder_too", "./model_config.yaml/a", b"x", errors=DAMAGED, says="model_config"
)
member(
    "folder_that_is_a_file_too",
    "./model_weights.ckpt/",
    b"",
    b"5",
    errors=DAMAGED,
    says="model_weights",
)
member("path_in_200_folders", "a/" * 49 + "b", b"x", prefix=b"a/" * 70 + b"a", errors=DAMAGED)

lie("size_is_an_exabyte", nemo(tar_header("./a", b"\x80" + EXABYTE.to_bytes(11, "big"))), says="a")
lie("size_is_negative", nemo(tar_header("./a", b"\xff" * 12)))
lie("size_is_text", nemo(tar_header("./a", b"-0000000001\0")))
lie("size_is_decimal", nemo(tar_header("./a", b"00000000099\0")))
lie("size_hides_the_next_member", nemo(tar_header("./a", 1 << 30)))
lie("checksum_is_wrong", nemo(tar_member("./a", b"x")[:148] + b"9" * 6 + tar_member("./a")[154:]))
lie("cut_in_a_header", nemo()[:700])
lie("cut_in_the_weights", nemo()[: -1024 - 512], says="model_weights")
lie("cut_by_one_byte", nemo()[:-1])
lie("cut_after_the_config", nemo()[:1024], errors=DAMAGED + "|" + REFUSED + "|UnknownFormat")
lie(
    "one_block_of_zeros_and_more", bytes(512) + nemo(), errors=DAMAGED + "|UnknownFormat|" + REFUSED
)
lie(
    "five_thousand_empty_folders",
    b"".join(tar_member(f"./d{i}/", b"", b"5") for i in range(5000)) + nemo(),
    kind="either",
)
lie(
    "five_thousand_extensions_of_extensions",
    tar_member("./x", record("a", "b"), b"x") * 5000 + nemo(),
    kind="either",
)
lie(
    "no_weights",
    tar_member("./model_config.yaml", YAML) + TAR_END,
    errors=DAMAGED + "|UnknownFormat",
)
lie("no_member_at_all", TAR_END, errors=DAMAGED + "|UnknownFormat")
lie("weights_are_garbage", nemo(weights=b"x" * 100), errors=DAMAGED + "|UnknownFormat")
lie("weights_are_empty", nemo(weights=b""))
lie("weights_are_cut", nemo(weights=saved(STATE)[:-10]))
lie(
    "weights_are_an_archive_again",
    nemo(weights=nemo()),
    errors=DAMAGED + "|UnknownFormat|" + REFUSED,
)
lie(
    "weights_run_code",
    nemo(weights=archive(pickled(Call(os.system, "touch CANARY")))),
    errors=REFUSED,
)
lie(
    "config_is_an_object",
    nemo(config=b"!!python/object/apply:os.system ['touch CANARY']\n"),
    errors=REFUSED,
    file="model_config.yaml",
)

extended("extended_path_leads_up", record("path", "../evil"), errors=REFUSED, says="evil")
extended("extended_path_is_absolute", record("path", "/evil"), errors=REFUSED, says="evil")
extended("extended_path_has_a_nul", record("path", "a\0b"), errors=DAMAGED)
extended("extended_path_of_a_mib", record("path", "a" * (1 << 20)), errors=DAMAGED)
extended("extended_size_is_an_exabyte", record("size", str(EXABYTE)), errors=DAMAGED)
extended("extended_size_is_negative", record("size", "-5"), errors=DAMAGED)
extended("extended_size_of_5000_digits", record("size", "9" * 5000), errors=DAMAGED)
extended("extended_twice", record("path", "a"), record("path", "../evil"), errors=REFUSED)
extended(
    "extended_sparse",
    record("GNU.sparse.major", "1"),
    record("GNU.sparse.minor", "0"),
    errors=REFUSED,
    says="sparse",
)
extended("extended_link", record("linkpath", "/etc/passwd"), kind="either")
extended("extended_for_all", record("path", "../evil"), letter=b"g", errors=DAMAGED + "|" + REFUSED)
extended("extended_record_without_length", b"path=../evil\n", errors=DAMAGED)
extended("extended_record_with_length_zero", b"0 path=../evil\n", errors=DAMAGED)
extended("extended_record_that_reaches_beyond", b"999 path=x\n", errors=DAMAGED)
gnu("long_name_leads_up", b"../evil\0", errors=REFUSED, says="evil")
gnu("long_name_is_absolute", b"/evil\0", errors=REFUSED, says="evil")
gnu("long_name_of_ten_thousand_letters", b"a" * 10_000, errors=DAMAGED)


def packed(name: str, data: bytes, **said: Any) -> None:
    lie(f"gzip_{name}", data, **said)


GOOD = gzip.compress(nemo(), mtime=0)


def exploding(size: int, tail: bytes = b"") -> bytes:
    """A gzip file of ``size`` zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [packer.compress(tail)]
    block = bytes(1 << 20)
    parts.extend(packer.compress(block) for _ in range(size >> 20))
    return b"".join((*parts, packer.flush()))


packed("is_cut", GOOD[: len(GOOD) // 2])
packed("is_cut_in_its_checksum", GOOD[:-3])
packed("checksum_is_wrong", GOOD[:-8] + b"\0\0\0\0" + GOOD[-4:])
packed("is_garbage_after_two_bytes", b"\x1f\x8b" + b"x" * 600)
packed("is_two_bytes", b"\x1f\x8b")
packed("is_followed_by_garbage", GOOD + b"garbage")
packed("of_gzip", gzip.compress(GOOD), errors=DAMAGED + "|UnknownFormat")
packed("of_nothing", gzip.compress(b""))
packed("of_a_cut_tar", gzip.compress(nemo()[:-1600]))
packed("bomb_of_zeros", exploding(128 << 20))
packed("bomb_in_a_member", exploding(256 << 20, tar_header("./a", 256 << 20)), errors=REFUSED)
packed("bomb_in_an_extension", exploding(64 << 20, tar_header("./a", 64 << 20, b"x")))
packed("of_five_thousand_empty_files", gzip.compress(b"") * 5000)
packed("header_without_end", b"\x1f\x8b\x08\x08" + bytes(6) + b"a" * 100_000)


def unpacked(name: str, change: Any, **said: Any) -> None:
    """The same tree as a folder."""

    def make(folder: Path) -> None:
        (folder / "model_config.yaml").write_bytes(YAML)
        (folder / "model_weights.ckpt").write_bytes(saved(STATE))
        change(folder)

    GROUP.add(f"unpacked_{name}", make, **said)


unpacked(
    "weights_are_cut",
    lambda f: os.truncate(f / "model_weights.ckpt", 900),
    file="model_weights.ckpt",
)
unpacked(
    "weights_twice",
    lambda f: write_dcp(f / "model_weights", common={}),
    errors="AmbiguousFormat",
    says="model_weights",
)
unpacked(
    "weights_are_a_link_to_nothing",
    lambda f: ((f / "model_weights.ckpt").unlink(), (f / "model_weights.ckpt").symlink_to("gone")),
    errors="CorruptCheckpoint|UnknownFormat|StorageError",
    says="model_",
)


def tarred(tree: Path, mode: str = "w", form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=form) as out:
        out.add(tree, ".")
    return buffer.getvalue()


def tree(folder: Path) -> Path:
    """The tree that is packed, outside of the checkpoint."""
    place = folder.parent / "tree"
    place.mkdir()
    (place / "model_config.yaml").write_bytes(YAML)
    (place / f"{'a' * 32}_tokenizer.model").write_bytes(b"tokens")
    return place


@GROUP.good()
def as_nemo_writes_it(folder):
    place = tree(folder)
    (place / "model_weights.ckpt").write_bytes(saved(STATE))
    (folder / NAME).write_bytes(tarred(place))
    return STATE


@GROUP.good()
def as_gnu_tar_writes_it_with_long_names(folder):
    place = tree(folder)
    (place / ("n" * 180)).write_bytes(b"x")
    (place / "model_weights.ckpt").write_bytes(saved(STATE))
    (folder / NAME).write_bytes(tarred(place, form=tarfile.GNU_FORMAT))
    return Target(NAME, STATE)


@GROUP.good()
def packed_with_gzip(folder):
    place = tree(folder)
    write_dcp(place / "model_weights", common={"iteration": 1})
    (folder / NAME).write_bytes(tarred(place, "w:gz"))
    return STATE


@GROUP.good()
def zarr_inside(folder):
    place = tree(folder)
    write_zarr(place / "model_weights")
    (folder / NAME).write_bytes(tarred(place))
    return STATE


@GROUP.good()
def gzip_in_several_members(folder):
    data = nemo()
    parts = [gzip.compress(data[at : at + 1000]) for at in range(0, len(data), 1000)]
    (folder / NAME).write_bytes(b"".join(parts))
    return STATE


@GROUP.good()
def without_the_blocks_at_its_end(folder):
    (folder / NAME).write_bytes(nemo()[: -len(TAR_END)])
    return STATE


@GROUP.good()
def a_rank_of_tensor_parallelism(folder):
    norm = "model.language_model.encoder.final_layernorm.weight"
    state = {norm: torch.arange(4.0)}
    held = tar_member("./mp_rank_00/model_weights.ckpt", saved(state))
    held += tar_member("./mp_rank_01/model_weights.ckpt", saved(state))
    config = tar_member("./model_config.yaml", YAML)
    (folder / NAME).write_bytes(config + held + TAR_END)
    return state


@GROUP.inert()
def a_member_that_is_called_like_the_canary(folder):
    data = nemo(tar_member(f"./{canary(folder).name}", b"x"))
    (folder / NAME).write_bytes(data)
