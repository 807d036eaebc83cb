"""Models that are divided among processes, written from all of them."""

from __future__ import annotations

import json
import math
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import bioinit
from bioinit import families, ranks
from bioinit.errors import BioinitError
from bioinit.initialize.across import described_by
from bioinit.save import remote, save, verify
from bioinit.save.across import Across
from bioinit.save.plain import Plain
from bioinit.save.writing import Wording
from bioinit.targets import describe, local, slots
from tests.processes import outcomes_of, together

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

LLAMA = {
    "vocab_size": 102,  # FSDP2 divides it unevenly among 4
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MIXTRAL = LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}
ESM = {
    "vocab_size": 33,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "position_embedding_type": "rotary",
    "pad_token_id": 1,
    "mask_token_id": 32,
    "emb_layer_norm_before": False,
    "token_dropout": True,
}
OPT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": 16,
}
RECIPES = {
    "llama": ("llama/causal_lm", ()),
    "mixtral": ("mixtral/causal_lm", ()),
    "esm2": ("esm2/token_classification", ("model.num_labels=3",)),
    "opt": ("auto/causal_lm", ()),
}
HEADS = {"esm2": {"architecture": "token_classification", "num_labels": 3}}


def class_of(name: str) -> tuple[Any, dict[str, Any]]:
    kinds = {
        "llama": (transformers.LlamaForCausalLM, LLAMA),
        "mixtral": (transformers.MixtralForCausalLM, MIXTRAL),
        "esm2": (transformers.EsmForMaskedLM, ESM),
        "opt": (transformers.OPTForCausalLM, OPT),
    }
    return kinds[name]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each model: a checkpoint, what one process makes and writes of it, and its values."""
    top = tmp_path_factory.mktemp("one")
    for name, (recipe, words) in RECIPES.items():
        cls, sizes = class_of(name)
        torch.manual_seed(7)
        model = cls(cls.config_class(**sizes))
        with torch.no_grad():  # norms start as ones, which would hide a mix-up
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(top / name / "from")
        (top / name / "from/tokenizer_config.json").write_text("{}")
        given = [f"model.initial_ckpt_path={top / name / 'from'}", *words]
        if name == "esm2":
            given.append("model.initial_ckpt_skip_keys_with_these_prefixes=[classifier]")
            given.append("init.on_unused=report")
        done = bioinit.initialize(bioinit.compose(recipe, given))
        done.save(top / name / "one")
        torch.save(done.model.state_dict(), top / name / "values.pt")
        if name != "opt":  # of which there is no table
            given.append("output.format=torch_dist")
            bioinit.initialize(bioinit.compose(recipe, given)).save(top / name / "one-dcp")
    return top


class Cell:
    """One model in this rank, divided, with the values of the whole one."""

    def __init__(self, top: Path, name: str, how: str) -> None:
        self.name, self.top = name, top / name
        self.checkpoint = bioinit.open_checkpoint(self.top / "from")
        context = self.checkpoint.context
        self.family = families.load("auto" if name == "opt" else name)
        shapes = {key: tensor.shape for key, tensor in self.checkpoint.tensors.items()}
        self.config: Any = described_by(self.family, context, HEADS.get(name, {}), shapes)
        self.backend = self.family.backend(self.config)
        self.model = self.backend.build(lambda: self.family.build(self.config))
        divide(self.model, how)
        self.fill(torch.load(self.top / "values.pt"))
        self.backend.remember(self.model, list(self.checkpoint.tensors))

    def fill(self, values: dict[str, torch.Tensor]) -> None:
        targets = describe(self.model)
        self.model.to_empty(device="cpu")
        with torch.no_grad():
            for slot in slots(self.model):
                target = targets[slot.key]
                if not target.persistent:
                    continue
                memory = local(slot.tensor)
                for box in target.boxes:
                    region = tuple(map(slice, box.offsets, map(sum, zip(*box[:2], strict=True))))
                    start = memory.storage_offset() + box.start
                    held = memory.as_strided(box.sizes, box.strides, start)
                    held.copy_(values[slot.key][region])

    def wording(self, to: str = "hf", form: str = "safetensors") -> Wording:
        context = self.checkpoint.context
        assert context is not None
        carried, homes = context.carried, tuple(self.checkpoint.homes)
        if self.name == "opt":
            return Plain(self.backend, form, carried, homes)
        return Across(self.family, self.name, self.config, to, form, {}, carried, homes)

    def save(self, path: Path, world: ranks.World, *form: str, **more: Any) -> dict[str, Any]:
        return save(
            self.model,
            path,
            backend=self.backend,
            record=self.config,
            receipt={"by": "a test"},
            across=self.wording(*form),
            world=world,
            **more,
        )


def divide(model: nn.Module, how: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from bioinit.backends.transformers.division import divide as by_plan

    size = torch.distributed.get_world_size()
    if how == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    elif how == "tp":
        by_plan(model, init_device_mesh("cpu", (size,)), {})
    elif how == "both":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        by_plan(model, mesh["tp"], {})
        fully_shard(model, mesh=mesh["dp"])
    else:
        assert how == "ddp"


def cells(top: Path, out: Path, wanted: list[tuple[str, str]]) -> list[Any]:
    """All that is written of ``wanted``; on each rank, what the test is told of it."""
    told: list[Any] = []
    for name, how in wanted:
        with ranks.together() as world:
            cell = Cell(top, name, how)
            first = cell.save(out / f"{name}-{how}-hf", world)
            cell.save(out / f"{name}-{how}-dcp", world, "hf", "torch_dist")
            if name == "llama":
                cell.save(out / f"{name}-{how}-nemo2", world, "nemo2", "torch_dist")
        told.append([file["path"] for file in first["files"]])
    return told


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with bioinit.open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def by_dcp(folder: Path) -> dict[str, torch.Tensor]:
    """What torch's own loader gives one process."""
    from torch.distributed import checkpoint as dcp

    known = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    empty = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in known.items()}
    dcp.load(empty, checkpoint_id=folder, no_dist=True)
    return empty


WANTED = {
    2: [("llama", "fsdp2"), ("llama", "tp"), ("mixtral", "tp"), ("opt", "fsdp2"), ("llama", "ddp")],
    4: [("llama", "both"), ("mixtral", "both"), ("esm2", "fsdp2"), ("mixtral", "fsdp2")],
}


@pytest.mark.parametrize("size", [2, 4])
def test_what_ranks_write_is_what_one_process_writes(
    written: Path, tmp_path: Path, size: int
) -> None:
    told = together(size, cells, written, tmp_path, WANTED[size])
    for name, how in WANTED[size]:
        one = load_file(written / name / "one/model.safetensors")
        table = one if name == "opt" else stored(written / name / "one-dcp")
        for form, wanted in {"hf": one, "dcp": table}.items():
            out = tmp_path / f"{name}-{how}-{form}"
            assert_same(stored(out), wanted)
            assert {entry["status"] for entry in verify(out)} == {"unchanged"}
            assert (out / "tokenizer_config.json").read_text() == "{}"
        assert_same(load_file(tmp_path / f"{name}-{how}-hf/model.safetensors"), one)
        assert_same(by_dcp(tmp_path / f"{name}-{how}-dcp"), table)
        configs = [
            json.loads((folder / "config.json").read_text())
            for folder in (written / name / "one", tmp_path / f"{name}-{how}-hf")
        ]
        assert configs[0] == configs[1]
        if name == "llama":
            conversion = written / name / "nemo2"
            if not conversion.exists():
                bioinit.convert(written / name / "from", conversion, "nemo2")
            assert_same(stored(tmp_path / f"{name}-{how}-nemo2"), stored(conversion))
    opened, told_of = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / f"llama-{'fsdp2' if size == 2 else 'both'}-hf", output_loading_info=True
    )
    assert not told_of["missing_keys"] and not told_of["unexpected_keys"]
    assert_same(dict(opened.state_dict()), torch.load(written / "llama/values.pt"))
    assert all(each == told[0] for each in told)  # every rank has the receipt
    assert not [*tmp_path.glob(".*")]


def test_nothing_is_asked_twice_and_of_no_rank_more_than_a_slab(
    written: Path, tmp_path: Path
) -> None:
    (whole, others), _ = together(2, asked_for, written, tmp_path)
    for asked, most, lacking in others:
        assert asked == lacking and most <= 4 * SLAB
    assert whole > 20 * SLAB


SLAB = 2048


def asked_for(top: Path, out: Path) -> tuple[int, list[Any]]:
    """Bytes of a model, and for each way of dividing it: asked for, at once, and not on rank 0."""
    from bioinit.formats.safetensors import shards

    shards.SLAB_BYTES = SLAB
    shards.worker_count = lambda: 4
    told = []
    for how in ("fsdp2", "tp"):
        with ranks.together() as world, remotes() as made:
            cell = Cell(top, "llama", how)
            targets = describe(cell.model)
            own = [t for t in targets.values() if t.persistent]
            lacking = sum((math.prod(t.shape) - t.held) * t.dtype.itemsize for t in own)
            cell.save(out / how, world)
            told += [(one.asked, one.most, lacking) for one in made]
    return sum(t.numel() * 4 for t in cell.model.parameters()), told


@contextmanager
def remotes() -> Iterator[list[remote.Remote]]:
    """Whoever asks other ranks inside."""
    found: list[remote.Remote] = []
    made = remote.Remote.__init__

    def counted(self: remote.Remote, *args: Any) -> None:
        made(self, *args)
        found.append(self)

    remote.Remote.__init__ = counted  # type: ignore[method-assign]
    try:
        yield found
    finally:
        remote.Remote.__init__ = made  # type: ignore[method-assign]


# What fails


@contextmanager
def small_files() -> Iterator[None]:
    """No file may be larger than a few KiB, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def blind() -> Iterator[None]:
    """As on a machine that does not share the file system."""
    sees = Path.is_dir
    Path.is_dir = lambda self: not self.name.endswith(".partial") and sees(self)  # type: ignore
    try:
        yield
    finally:
        Path.is_dir = sees  # type: ignore[method-assign]


FAILING: dict[str, tuple[int, Callable[[], Any], tuple[str, str]]] = {
    "full for rank 1": (1, small_files, ("hf", "torch_dist")),
    "full for rank 0": (0, small_files, ("hf", "safetensors")),
    "full for rank 0 of all": (0, small_files, ("hf", "torch_dist")),
    "blind": (1, blind, ("hf", "torch_dist")),
}


def failures(top: Path, out: Path) -> dict[str, tuple[str, str, float, list[str]]]:
    """What each rank raises, how soon, and what is left then."""
    told = {}
    for what, (rank, trouble, form) in FAILING.items():
        begun = time.monotonic()
        place = out / what.replace(" ", "-")
        place.mkdir(exist_ok=True)
        try:
            with ranks.together() as world:
                cell = Cell(top, "llama", "fsdp2")
                begun = time.monotonic()
                if world.rank == rank:
                    with trouble():
                        cell.save(place / "out", world, *form)
                else:
                    cell.save(place / "out", world, *form)
        except BioinitError as error:
            said = (type(error).__name__, str(error), time.monotonic() - begun)
        with ranks.together():
            pass
        told[what] = (*said, [*map(str, place.iterdir())])
    with ranks.together() as world:  # and afterwards all is well again
        cell.save(place / "out", world)
    return told


def test_the_error_of_one_rank_is_that_of_all_and_nothing_is_left(
    written: Path, tmp_path: Path
) -> None:
    both = together(2, failures, written, tmp_path)
    for what, (rank, _, _) in FAILING.items():
        for number, told in enumerate(both):
            kind, message, seconds, left = told[what]
            assert kind == "StorageError" and seconds < 30 and not left, (what, told[what])
            assert message.startswith(f"rank {rank}: ") == (number != rank), message
            word = "no such folder" if what == "blind" else "file too large"
            assert word in message, message


def dying(top: Path, out: Path) -> None:
    def dead(memories: Any, group: Any) -> None:
        os._exit(9)

    remote.serve = dead
    with ranks.together() as world:
        Cell(top, "llama", "fsdp2").save(out / "out", world)


def test_a_rank_that_dies_while_it_is_asked_ends_the_others(written: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    first, second = outcomes_of(2, dying, written, tmp_path, timeout=100)
    assert second == ("died", 9)
    assert first[0] == "raised" and "rank 1" in first[1], first[1]
    assert time.monotonic() - begun < 60
    assert not [*tmp_path.iterdir()]
