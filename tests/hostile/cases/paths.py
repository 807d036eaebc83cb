"""Ways to spell and to store a good checkpoint, all of which must open."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.hostile.corpus import Group, Target
from tests.hostile.craft import (
    STATE,
    SerializationFormat,
    saved,
    write_dcp,
    write_layers,
    write_zarr,
)

GROUP = Group("paths")


@GROUP.good()
def nemo_2s_name_with_equal_signs(folder):
    name = "epoch=0-step=9-consumed_samples=20.0-last"
    write_dcp(folder / name / "weights", common={"global_step": 9})
    return Target(name, STATE)


@GROUP.good()
def a_relative_path_to_zarr(folder):
    write_zarr(folder)
    return Target("", STATE, relative=True)


@GROUP.good()
def a_relative_path_with_dots(folder):
    write_dcp(folder / "weights")
    return Target("weights/../weights/.", STATE, relative=True)


@GROUP.good()
def a_slash_at_the_end(folder):
    write_dcp(folder / "weights", common={})
    return Target("weights/", STATE)


@GROUP.good()
def two_slashes_in_the_middle(folder):
    write_dcp(folder / "a" / "weights", common={})
    return Target("a//weights//", STATE)


@GROUP.good()
def through_a_link_to_the_folder(folder):
    real = folder.parent / "elsewhere"
    write_dcp(real / "weights", common={})
    (folder / "link").symlink_to(real)
    return Target("link", STATE, also=(real,))


@GROUP.good()
def through_a_chain_of_links(folder):
    write_zarr(folder / "real")
    (folder / "one").symlink_to("real")
    (folder / "two").symlink_to(folder / "one")
    return Target("two", STATE)


@GROUP.good()
def through_a_link_above(folder):
    write_layers(folder / "a" / "global_step1")
    (folder / "b").symlink_to("a")
    return Target("b/global_step1")


@GROUP.good()
def files_that_are_hard_links(folder):
    write_dcp(folder)
    for file in list(folder.iterdir()):
        copy = folder / "copy"
        shutil.copy(file, copy)
        file.unlink()
        file.hardlink_to(copy)
        copy.unlink()
    return STATE


@GROUP.good()
def distcp_files_that_are_links(folder):
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    write_dcp(folder, common={})
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"{number}")
        file.symlink_to(blobs / f"{number}")
    return Target("", STATE, also=(blobs,))


@GROUP.good()
def names_of_folders_with_odd_letters(folder):
    place = folder / "a b" / "ünï*?[x]" / "50%\n{x}"
    place.mkdir(parents=True)
    save_file(STATE, place / "model.safetensors")
    return Target(place, STATE)


@GROUP.good()
def a_name_of_200_letters(folder):
    (folder / f"{'n' * 200}.pt").write_bytes(saved(STATE))
    return STATE


@GROUP.good()
def files_that_nobody_may_write(folder):
    write_zarr(folder)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o444)
    return STATE


@GROUP.good()
def other_files_beside_the_weights(folder):
    save_file(STATE, folder / "model.safetensors")
    (folder / "evil.py").write_text("raise SystemExit")
    (folder / "__init__.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"garbage")
    (folder / "README.md").write_text("x")
    (folder / ".git").mkdir()
    return STATE


@GROUP.good()
def a_step_beside_its_pointer(folder):
    write_dcp(folder / "iter_0000003", common={})
    write_dcp(folder / "iter_0000009", {"old": torch.ones(1)}, common={})
    (folder / "latest_checkpointed_iteration.txt").write_text("3\n")
    return STATE


@GROUP.good()
def the_image_of_a_distributed_checkpoint(folder):
    write_dcp(folder / "x", kind=SerializationFormat.SAFETENSORS)
    return Target("x", STATE)


@GROUP.good()
def pointed_at_one_file_of_a_distributed_checkpoint(folder):
    write_dcp(folder)
    return Target(next(folder.glob("*.distcp")).name, STATE)


@GROUP.good()
def nan_and_infinity_and_negative_zero(folder):
    bits = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    state = {"a": bits, "b": bits.to(torch.float8_e4m3fn), "c": bits.half()}
    write_dcp(folder, state)
    return state


assert Path
