"""Every source by every way to share a model: what each rank holds is its slice of the whole.

The parent process starts each model alone; ranks start the same record under a strategy, and hold
their shards, claims and logits against that.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zarr
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import bioinit
from tests.processes import together

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

UNEVEN = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, Any] = {
    "esm2": (
        transformers.EsmForMaskedLM,
        transformers.EsmConfig(
            **UNEVEN,
            intermediate_size=27 * 2,
            vocab_size=33,
            mask_token_id=32,
            pad_token_id=1,
            max_position_embeddings=64,
            position_embedding_type="rotary",
            token_dropout=True,
            emb_layer_norm_before=False,
        ),
    ),
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            **UNEVEN, intermediate_size=27 * 2, vocab_size=101, num_key_value_heads=2
        ),
    ),
    "mixtral": (
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig(
            **UNEVEN,
            intermediate_size=26,
            vocab_size=101,
            num_key_value_heads=2,
            num_local_experts=3,
        ),
    ),
    "gpt_neox": (
        transformers.GPTNeoXForCausalLM,
        transformers.GPTNeoXConfig(
            **UNEVEN,
            intermediate_size=27 * 2,
            vocab_size=104,
            max_position_embeddings=64,
            rotary_pct=1.0,
        ),
    ),
}
RECIPES = {
    "esm2": ("esm2/token_classification", ["model.num_labels=3"]),
    "llama": ("llama/causal_lm", []),
    "mixtral": ("mixtral/causal_lm", []),
    "gpt_neox": ("gpt_neox/causal_lm", []),
}
SOURCES = [
    *((layout, name) for layout in ("safetensors", "torch_dist", "zarr") for name in MODELS
      if name != "gpt_neox"),
    ("neox", "gpt_neox"),
]  # fmt: skip
SHARED = {
    2: (["strategy=fsdp2"], ["strategy=tp"], ["strategy=ddp", "parallel_load=on"]),
    4: (["strategy=fsdp2"], ["strategy=fsdp2+tp", "mesh={dp: 2, tp: 2}"]),
}
INPUT = torch.arange(4, 20).view(2, 8)
COMPARED = ("fields", "tensors", "unused", "problems", "skip_prefixes", "parameters")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every source, and beside it what one process starts from it."""
    folder = tmp_path_factory.mktemp("matrix")
    for name, (cls, config) in MODELS.items():
        torch.manual_seed(5)
        model = cls(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(folder / f"safetensors_{name}")
        if name == "gpt_neox":
            bioinit.convert(
                folder / f"safetensors_{name}", folder / f"neox_{name}", "neox", partitions=2
            )
        else:
            whole = folder / f"nemo2_{name}"
            bioinit.convert(folder / f"safetensors_{name}", whole, "nemo2")
            for layout, write in (("torch_dist", write_torch_dist), ("zarr", write_zarr)):
                shutil.copytree(whole / "context", folder / f"{layout}_{name}" / "context")
                write(whole, folder / f"{layout}_{name}" / "weights")
    for layout, name in SOURCES:
        done = bioinit.initialize(record(folder, layout, name))
        torch.save(
            {
                "state": dict(done.model.state_dict()),
                "logits": logits(done.model),
                "report": json.loads(json.dumps(done.report.to_json(), default=str)),
            },
            folder / f"{layout}_{name}.expected",
        )
    return folder


def record(folder: Path, layout: str, name: str, *placement: str) -> Any:
    recipe, overrides = RECIPES[name]
    placed = [f"placement.{each}" for each in placement]
    path = f"model.initial_ckpt_path={folder / f'{layout}_{name}'}"
    return bioinit.compose(recipe, [*overrides, path, *placed])


def logits(model: torch.nn.Module) -> torch.Tensor:
    model.set_experts_implementation("eager")  # grouped_mm wants sizes that are multiples of 4
    with torch.no_grad():
        found = model.eval()(INPUT).logits
    return found.full_tensor() if isinstance(found, DTensor) else found


def cut(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one chunk where two tensor-parallel ranks wrote: layers first, and halves."""
    stacked = (1,) * (name.count(".layers.") + name.count(".experts.experts."))
    rest = list(shape[len(stacked) :])
    by_column = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    dim = len(rest) - 1 if by_column else 0
    if len(rest) > by_column and rest[dim] % 2 == 0 and "norm" not in name:
        rest[dim] //= 2
    return (*stacked, *rest)


class Chunked(DefaultSavePlanner):
    """Has torch write every tensor in the chunks that ``cut`` says."""

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, tensor in self.state_dict.items():
            sizes = cut(name, tuple(tensor.shape))
            counts = [whole // part for whole, part in zip(tensor.shape, sizes, strict=True)]
            for place in torch.cartesian_prod(*map(torch.arange, counts)).view(-1, len(sizes)):
                offsets = torch.Size(int(p) * size for p, size in zip(place, sizes, strict=True))
                data = TensorWriteData(
                    ChunkStorageMetadata(offsets, torch.Size(sizes)),
                    TensorProperties.create_from_tensor(tensor),
                    tensor.size(),
                )
                index = MetadataIndex(name, offsets)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        sizes = write_item.tensor_data.chunk.sizes
        found = self.state_dict[write_item.index.fqn]
        for dim, (offset, size) in enumerate(zip(write_item.index.offset, sizes, strict=True)):
            found = found.narrow(dim, offset, size)
        return found.contiguous()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with bioinit.open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def write_torch_dist(whole: Path, weights: Path) -> None:
    save(
        tensors(whole),
        storage_writer=FileSystemWriter(weights),
        planner=Chunked(flatten_state_dict=False),
        no_dist=True,
    )
    for name in ("common.pt", "metadata.json"):
        shutil.copy(whole / "weights" / name, weights / name)


def write_zarr(whole: Path, weights: Path) -> None:
    for name, tensor in tensors(whole).items():
        array = zarr.open(
            str(weights / name),
            mode="w",
            shape=tensor.shape,
            chunks=cut(name, tuple(tensor.shape)),
            dtype="float32",
            compressor=None,
            fill_value=None,
        )
        array[:] = tensor.numpy()
    said = {"sharded_backend": "zarr", "sharded_backend_version": 1}
    (weights / "metadata.json").write_text(json.dumps(said))
    shutil.copy(whole / "weights" / "common.pt", weights / "common.pt")


def slice_of(whole: torch.Tensor, held: DTensor) -> torch.Tensor:
    """What torch puts on this rank: the tensor-parallel chunk, and of that a data-parallel one."""
    mesh = held.device_mesh
    placed = list(zip(held.placements, mesh.get_coordinate(), mesh.mesh.shape, strict=True))
    strided = [each for each in placed if isinstance(each[0], _StridedShard)]
    plain = [each for each in placed if type(each[0]) is Shard]
    for placement, coordinate, size in plain:
        whole = part(whole, placement.dim, coordinate, size)
    for placement, coordinate, size in strided:
        factor = placement.split_factor
        if any(p.dim == placement.dim for p, _, _ in plain):
            assert factor == next(size for p, _, size in plain if p.dim == placement.dim)
            whole = part(whole, placement.dim, coordinate, size)
        else:
            groups = whole.chunk(factor, placement.dim)
            whole = torch.cat(
                [part(group, placement.dim, coordinate, size) for group in groups], placement.dim
            )
    return whole


def part(whole: torch.Tensor, dim: int, coordinate: int, count: int) -> torch.Tensor:
    chunks = whole.chunk(count, dim)
    return chunks[coordinate] if coordinate < len(chunks) else whole.narrow(dim, 0, 0)


def start_all(folder: str, size: int) -> list[str]:
    """Run in every rank: all sources by all strategies; what went wrong."""
    wrong = []
    for layout, name in SOURCES:
        expected = torch.load(Path(folder) / f"{layout}_{name}.expected", weights_only=False)
        for placement in SHARED[size]:
            cell = f"{layout} {name} {' '.join(placement)}"
            done = bioinit.initialize(record(Path(folder), layout, name, *placement))
            wrong += [f"{cell}: {text}" for text in compared(done, expected)]
            is_divided = any(isinstance(p, DTensor) for p in done.model.parameters())
            if is_divided != ("strategy=ddp" not in placement) or len(done.report.ranks) != size:
                wrong.append(f"{cell}: not divided so: {done.report.ranks}")
    return wrong


def compared(done: Any, expected: dict[str, Any]) -> list[str]:
    wrong = []
    state = dict(done.model.state_dict())
    if list(state) != list(expected["state"]):
        wrong.append(f"keys {sorted(set(state) ^ set(expected['state']))}")
    for key, held in state.items():
        whole = expected["state"][key]
        local = held.to_local() if isinstance(held, DTensor) else held
        wanted = slice_of(whole, held) if isinstance(held, DTensor) else whole
        if local.shape != wanted.shape or not torch.equal(local, wanted):
            wrong.append(f"{key} {tuple(local.shape)} is not its slice {tuple(wanted.shape)}")
    report = json.loads(json.dumps(done.report.to_json(), default=str))
    for name in COMPARED:
        ours, theirs = report[name], expected["report"][name]
        if name == "fields":  # where the model lies is no part of what it is
            ours, theirs = [
                [f for f in fields if f["field"] != "initial_ckpt_path"]
                for fields in (ours, theirs)
            ]
        if ours != theirs:
            wrong.append(f"{name} of the receipt: {ours} instead of {theirs}")
    far = (logits(done.model) - expected["logits"]).abs().max().item()
    # Sums over shards are added up in another order: float32 keeps six digits of them.
    if not far <= 1e-5:
        wrong.append(f"logits differ by {far}")
    return wrong


@pytest.mark.parametrize("size", list(SHARED))
def test_every_rank_holds_its_slices_of_what_one_process_starts(size, sources):
    assert together(size, start_all, str(sources), size, timeout=600) == [[]] * size
