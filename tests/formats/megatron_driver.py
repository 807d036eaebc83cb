"""Writes checkpoints with megatron-core itself: run as a script by ``test_megatron_core.py``.

Two processes over gloo build a small model in each layout in turn, save it in each format asked
for (``python megatron_driver.py FOLDER FORMAT...``), and store what each of them held in memory
beside it, so that the reader is held against the model and not the format.

megatron-core lost its zarr writer with 0.16. What that wrote is written here with zarr 2 from the
sharded tensors and objects that megatron-core still makes, and the rest by its own functions.
"""

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
import torch.multiprocessing

WORLD = 2
LAYERS, HIDDEN, HEADS, GROUPS, FFN, VOCAB, EXPERTS = 2, 16, 4, 2, 24, 32, 2


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One model in one parallel layout; what ``WORLD`` is larger by becomes data parallel."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    gated: bool = False
    moe: bool = False
    dtype: torch.dtype = torch.float32


LAYOUTS = {
    "tp1": Layout(),
    "tp2": Layout(tensor=2),
    "pp2": Layout(pipeline=2),
    "tp2_swiglu": Layout(tensor=2, gated=True),
    "pp2_swiglu_bf16": Layout(pipeline=2, gated=True, dtype=torch.bfloat16),
    "tp1_moe": Layout(moe=True, gated=True),
    "tp2_moe": Layout(tensor=2, moe=True, gated=True),
    "ep2_moe": Layout(expert=2, moe=True, gated=True),
    "pp2_moe": Layout(pipeline=2, moe=True, gated=True),
}


def build(layout: Layout) -> torch.nn.Module:
    """A GPT of the layout, the part of it that this process holds."""
    import torch.nn.functional
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    experts = EXPERTS if layout.moe else None
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        use_cpu_initialization=True,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        pipeline_dtype=layout.dtype,
        params_dtype=layout.dtype,
        bf16=layout.dtype == torch.bfloat16,
        gated_linear_unit=layout.gated,
        activation_func=torch.nn.functional.silu if layout.gated else torch.nn.functional.gelu,
        add_bias_linear=not layout.gated,
        num_moe_experts=experts,
        expert_model_parallel_size=layout.expert,
        moe_router_load_balancing_type="none",
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(num_experts=experts),
        vocab_size=VOCAB,
        max_sequence_length=8,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
    )


def held(model: torch.nn.Module) -> dict[str, dict[str, object]]:
    """Each parameter of this process: its values, and along which dim it is cut."""
    return {
        name: {
            "tensor": parameter.detach().clone(),
            "dim": parameter.partition_dim
            if getattr(parameter, "tensor_model_parallel", False)
            else None,
        }
        for name, parameter in model.named_parameters()
    }


def fill(model: torch.nn.Module, layout: Layout) -> None:
    """Values that differ wherever the whole model has another place, and only there."""
    from megatron.core import parallel_state

    tensor = parallel_state.get_tensor_model_parallel_rank()
    pipeline = parallel_state.get_pipeline_model_parallel_rank()
    first_expert = parallel_state.get_expert_model_parallel_rank() * EXPERTS // layout.expert
    for number, (name, parameter) in enumerate(model.named_parameters()):
        is_cut = getattr(parameter, "tensor_model_parallel", False)
        generator = torch.Generator().manual_seed(number + 1000 * pipeline + 5000 * tensor * is_cut)
        values = torch.randn(parameter.shape, generator=generator)
        if "local_experts" in name:
            values += first_expert
        parameter.data = values.to(parameter.dtype)


def save_torch_dist(state: dict[str, object], folder: Path) -> None:
    """As megatron-core does."""
    from megatron.core import dist_checkpointing

    dist_checkpointing.save(state, str(folder))


def save_zarr(state: dict[str, object], folder: Path) -> None:
    """As megatron-core 0.8 to 0.15 did: an array per tensor, a chunk per part that a rank holds."""
    import zarr
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy

    sharded, common = save_preprocess(state)
    torch_files = TorchCommonSaveStrategy("torch", 1)
    torch_files.save_common(common, folder)
    parts = [part for part in nested_values(sharded) if is_main_replica(part.replica_id)]
    objects = {str(n): part for n, part in enumerate(parts) if isinstance(part, ShardedObject)}
    torch_files.save_sharded_objects(objects, folder)
    tensors = [part for part in parts if not isinstance(part, ShardedObject)]
    first = [part for part in tensors if not any(part.global_offset)]
    for part in first:
        zarr.create(
            part.global_shape,
            chunks=part.max_allowed_chunks(),
            dtype=in_zarr(part.data).dtype,
            compressor=None,
            fill_value=None,
            store=str(folder / part.key),
        )
    dist.barrier()
    for part in tensors:
        zarr.open(str(folder / part.key), mode="r+")[part.global_slice()] = in_zarr(part.data)
    dist.barrier()
    for part in first:
        if part.dtype == torch.bfloat16:
            header = folder / part.key / ".zarray"
            said = json.loads(header.read_text()) | {"dtype": "bfloat16"}
            header.write_text(json.dumps(said, indent=4))
    dist.barrier()
    if dist.get_rank() == 0:
        save_config(CheckpointingConfig("zarr", 1), str(folder))
    dist.barrier()


def in_zarr(tensor: torch.Tensor) -> numpy.ndarray:
    """What zarr 2 is given: bfloat16, which it does not know, as the bits that it stores."""
    values = tensor.detach()
    return (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()


SAVE = {"torch_dist": save_torch_dist, "zarr": save_zarr}


def write(layout: Layout, name: str, formats: Sequence[str], folder: Path) -> None:
    """Save a model of the layout in each format, and what this process held of it."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        layout.tensor, layout.pipeline, expert_model_parallel_size=layout.expert
    )
    model = build(layout)
    fill(model, layout)
    for format_name in formats:
        weights = folder / format_name / name / "weights"
        if dist.get_rank() == 0:
            weights.mkdir(parents=True)
        dist.barrier()
        state = {"model": model.sharded_state_dict(), "iteration": 5, "checkpoint_version": 3.0}
        SAVE[format_name](state, weights)
    ranks = {
        "tensor": parallel_state.get_tensor_model_parallel_rank(),
        "pipeline": parallel_state.get_pipeline_model_parallel_rank(),
        "expert": parallel_state.get_expert_model_parallel_rank(),
        "layers": LAYERS // layout.pipeline,
        "experts": EXPERTS // layout.expert,
    }
    torch.save({**ranks, "held": held(model)}, folder / f"{name}.rank{dist.get_rank()}")
    parallel_state.destroy_model_parallel()


def process(rank: int, folder: str, formats: Sequence[str], meeting: str) -> None:
    """One of the two processes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.current_device = lambda: "cpu"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    for name, layout in LAYOUTS.items():
        write(layout, name, formats, Path(folder))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        folder, *formats = sys.argv[1:]
        torch.multiprocessing.spawn(process, (folder, formats, f"{scratch}/meeting"), nprocs=WORLD)
