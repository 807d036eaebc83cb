"""Models that are divided among processes, written from all of them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import threading
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
from bioinit import ranks
from bioinit.errors import BioinitError, ConfigError
from bioinit.layout import Box
from bioinit.ranks import ALONE
from bioinit.ranks.watch import Pace
from bioinit.save import remote, save, verify
from bioinit.save.shares import shares_of
from bioinit.targets import Located, describe, local
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
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MIXTRAL = LLAMA | {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
OPT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": 16,
}
RECIPES = {"llama": "llama/causal_lm", "mixtral": "mixtral/causal_lm", "opt": "auto/causal_lm"}
SLAB = 2048


def write_source(name: str, folder: Path) -> None:
    """A checkpoint to start from, in which no two values are alike."""
    kinds = {
        "llama": (transformers.LlamaForCausalLM, LLAMA),
        "mixtral": (transformers.MixtralForCausalLM, MIXTRAL),
        "opt": (transformers.OPTForCausalLM, OPT),
    }
    cls, sizes = kinds[name]
    torch.manual_seed(7)
    model = cls(cls.config_class(**sizes))
    with torch.no_grad():  # norms start as ones, which would hide a mix-up
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")


def start(source: Path, name: str, *words: str) -> bioinit.Initialized:
    given = [f"model.initial_ckpt_path={source}", *words]
    return bioinit.initialize(bioinit.compose(RECIPES[name], given))


def write(done: bioinit.Initialized, path: Path, to: str, form: str) -> None:
    """What ``done`` is, in a dialect and a format that its run did not ask for. All ranks call."""
    prepared: Any = done._prepared
    told = prepared.across
    told = getattr(told, "tables", None) or told
    changed = {"format": form} if told.to == to else {"format": form, "to": to}
    with ranks.together() as world:
        save(
            done.model,
            path,
            backend=prepared.backend,
            record=prepared.record,
            receipt={"by": "a test"},
            across=dataclasses.replace(told, **changed),
            world=world,
        )


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each model: a checkpoint, what one process writes of it, and its values."""
    found = tmp_path_factory.mktemp("one")
    for name in RECIPES:
        write_source(name, found / name / "from")
        done = start(found / name / "from", name)
        done.save(found / name / "one")
        write(done, found / name / "one-dcp", "hf", "torch_dist")
        torch.save(done.model.state_dict(), found / name / "values.pt")
    bioinit.convert(found / "llama/from", found / "llama/nemo2", "nemo2")
    return found


# Two ranks write, and read one another's parts


def by_two(top: Path) -> dict[str, Any]:
    """All that two ranks do, and what the test is told of it."""
    from bioinit.formats import _filling
    from bioinit.formats.safetensors import shards

    told: dict[str, Any] = {}
    for name, strategy in (("llama", "fsdp2"), ("opt", "fsdp2"), ("mixtral", "ddp")):
        done = start(top / name / "from", name, f"placement.strategy={strategy}")
        out = top / f"{name}-{strategy}"
        if name == "llama":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(shards, "SLAB_BYTES", SLAB)
                patch.setattr(_filling, "worker_count", lambda: 4)
                with questions() as told["asked"]:
                    receipt = done.save(out / "hf")
            owned = [t for t in describe(done.model).values() if t.persistent]
            sizes = [(math.prod(t.shape), t.held, t.dtype.itemsize) for t in owned]
            told["lacking"] = sum((whole - held) * item for whole, held, item in sizes)
            told["receipt"] = [file["path"] for file in receipt["files"]]
            write(done, out / "nemo2", "nemo2", "torch_dist")
        else:
            done.save(out / "hf")
        write(done, out / "dcp", "hf", "torch_dist")
        if name == "llama":
            told["differs"] = in_another_layout(top, out / "dcp")
            told["failed"] = failures(done, top / "failing")
    return told


@contextmanager
def questions() -> Iterator[dict[str, int]]:
    """How many bytes are asked of other ranks inside, and how many at once at most."""
    found = {"all": 0, "now": 0, "most": 0}
    lock = threading.Lock()
    ask = remote.Remote._range

    def counted(self: remote.Remote, rank: int, number: int, offset: int, length: int) -> Any:
        with lock:
            found["all"] += length
            found["now"] += length
            found["most"] = max(found["most"], found["now"])
        try:
            return ask(self, rank, number, offset, length)
        finally:
            with lock:
                found["now"] -= length

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote.Remote, "_range", counted)
        yield found


def in_another_layout(top: Path, folder: Path) -> list[str]:
    """What torch's own loader gives DTensors that are divided by columns, and should not."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    values = torch.load(top / "llama/values.pt")
    mesh = init_device_mesh("cpu", (2,))
    asked = {
        name: distribute_tensor(torch.zeros_like(value), mesh, [Shard(value.ndim - 1)])
        for name, value in values.items()
    }
    dcp.load(asked, checkpoint_id=folder)
    rank = torch.distributed.get_rank()
    return [
        name
        for name, value in values.items()
        if not torch.equal(local(asked[name]), value.tensor_split(2, value.ndim - 1)[rank])
    ]


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


FAILING: dict[str, tuple[int, Callable[[], Any], str]] = {
    "full for rank 1": (1, small_files, "torch_dist"),
    "full for rank 0": (0, small_files, "safetensors"),
    "blind": (1, blind, "torch_dist"),
}


def failures(done: bioinit.Initialized, out: Path) -> dict[str, tuple[str, str, float, list[str]]]:
    """What this rank raises, how soon, and what is left then."""
    told = {}
    rank = torch.distributed.get_rank()
    for what, (failing, trouble, form) in FAILING.items():
        place = out / what.replace(" ", "-")
        place.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        try:
            if rank == failing:
                with trouble():
                    write(done, place / "out", "hf", form)
            else:
                write(done, place / "out", "hf", form)
        except BioinitError as error:
            said = (type(error).__name__, str(error), time.monotonic() - begun)
        with ranks.together():
            pass
        told[what] = (*said, [*map(str, place.iterdir())])
    done.save(out / "well")  # and afterwards all is well again
    return told


@pytest.fixture(scope="module")
def told(top: Path) -> list[dict[str, Any]]:
    return together(2, by_two, top)


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


def assert_as_one_process(top: Path, name: str, out: Path) -> None:
    one = load_file(top / name / "one/model.safetensors")
    assert_same(load_file(out / "hf/model.safetensors"), one)
    table = stored(top / name / "one-dcp")
    assert_same(stored(out / "dcp"), table)
    assert_same(by_dcp(out / "dcp"), table)
    for folder in (out / "hf", out / "dcp"):
        assert {entry["status"] for entry in verify(folder)} == {"unchanged"}
        assert (folder / "tokenizer_config.json").read_text() == "{}"
    configs = [
        json.loads((folder / "config.json").read_text())
        for folder in (top / name / "one", out / "hf")
    ]
    assert configs[0] == configs[1]
    assert not [*out.glob(".*")]


@pytest.mark.parametrize("cell", ["llama-fsdp2", "opt-fsdp2", "mixtral-ddp"])
def test_what_two_ranks_write_is_what_one_process_writes(
    top: Path, told: list[dict[str, Any]], cell: str
) -> None:
    assert_as_one_process(top, cell.partition("-")[0], top / cell)
    first, second = told
    assert first["receipt"] == second["receipt"]


def test_what_two_ranks_write_for_nemo_is_what_a_conversion_writes(
    top: Path, told: list[dict[str, Any]]
) -> None:
    assert_same(stored(top / "llama-fsdp2/nemo2"), stored(top / "llama/nemo2"))


def test_torch_reads_into_other_parts_what_two_ranks_wrote(told: list[dict[str, Any]]) -> None:
    assert [each["differs"] for each in told] == [[], []]


def test_nothing_is_asked_twice_and_of_no_rank_more_than_a_slab(
    told: list[dict[str, Any]],
) -> None:
    asked = told[0]["asked"]
    assert asked["all"] == told[0]["lacking"] > 20 * SLAB and asked["most"] <= 4 * SLAB
    assert not told[1]["asked"]["all"]


@pytest.mark.parametrize("what", FAILING)
def test_the_error_of_one_rank_is_that_of_all_and_nothing_is_left(
    top: Path, told: list[dict[str, Any]], what: str
) -> None:
    rank = FAILING[what][0]
    for number, each in enumerate(told):
        kind, message, seconds, left = each["failed"][what]
        assert kind == "StorageError" and seconds < 30 and not left, (message, seconds, left)
        assert message.startswith(f"rank {rank}: ") == (number != rank), message
        word = "no such folder" if what == "blind" else "file too large"
        assert word in message, message
    assert verify(top / "failing/well")


# Four ranks read what two wrote


def by_four(top: Path) -> None:
    for name, source in (("llama", "llama-fsdp2/dcp"), ("mixtral", "mixtral/from")):
        mesh = "placement.mesh={dp: 2, tp: 2}"
        done = start(top / source, name, mesh)
        done.save(top / f"{name}-both/hf")
        write(done, top / f"{name}-both/dcp", "hf", "torch_dist")


def test_four_ranks_read_what_two_wrote_and_write_what_one_process_writes(
    top: Path, told: list[dict[str, Any]]
) -> None:
    together(4, by_four, top)
    for name in ("llama", "mixtral"):
        assert_as_one_process(top, name, top / f"{name}-both")
    opened, told_of = transformers.AutoModelForCausalLM.from_pretrained(
        top / "llama-both/hf", output_loading_info=True
    )
    assert not told_of["missing_keys"] and not told_of["unexpected_keys"]
    assert_same(dict(opened.state_dict()), torch.load(top / "llama/values.pt"))


# One dies


def dying(top: Path, out: Path) -> None:
    def dead(memories: Any, group: Any) -> None:
        os._exit(9)

    remote.serve = dead
    ranks.PACE = Pace(tick=0.3, lost=4.0, join=60.0, interrupt=1.0, grace=6.0)
    done = start(top / "opt/from", "opt", "placement.strategy=fsdp2")
    done.save(out / "out")


def test_a_rank_that_dies_while_it_is_asked_ends_the_others(top: Path, tmp_path: Path) -> None:
    first, second = outcomes_of(2, dying, top, tmp_path, timeout=100)
    assert second == ("died", 9)
    assert first[0] == "raised" and "rank 1" in first[1], first[1]
    assert not [*tmp_path.iterdir()]


# By one process


def test_regions_that_overlap_or_leave_something_out_are_refused() -> None:
    model = nn.Linear(2, 4, bias=False)
    for rows in ([(0, 3), (2, 4)], [(0, 1), (2, 4)]):
        boxes = tuple(Box((a, 0), (b - a, 2), 2 * a, (2, 1)) for a, b in rows)
        with pytest.raises(ConfigError, match=r"2 different regions of 'weight' \[4, 2\]"):
            shares_of(model, {"weight": Located("weight", (4, 2), boxes)}, ALONE)


def test_a_class_keeps_its_own_name_in_what_is_written(tmp_path: Path) -> None:
    from bioinit.backends.transformers import save_beside

    class FSDPishForCausalLM(transformers.OPTForCausalLM):
        pass

    save_beside(FSDPishForCausalLM(transformers.OPTConfig(**OPT)), tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["architectures"] == ["FSDPishForCausalLM"]
