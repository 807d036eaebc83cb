"""Models of megatron-core that start from what NeMo 2 wrote, by the names of BioNeMo."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from bioinit import open_checkpoint
from bioinit.backends import megatron
from bioinit.compat.bionemo import (
    IOMixinWithGettersSetters,
    MegatronBioNeMoTrainableModelConfig,
    load_weights_sharded_inplace_nemo2_to_mcore,
)
from bioinit.compat.bionemo.transformer_config import StandIn
from bioinit.compat.nemo import io
from bioinit.errors import PlanError

pytest.importorskip("megatron", reason="megatron-core is not installed")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:megatron",
    "ignore:torch.distributed is disabled",
    "ignore::FutureWarning",
)
LAYERS, VOCAB, WIDTH = 3, 24, 16
LLAMA = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "gated_linear_unit": True,
    "activation_func": "silu",
}
EXPERTS = LLAMA | {"num_moe_experts": 3, "moe_router_topk": 2}


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """Whatever world the tests make is gone after them."""
    yield
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def gpt(fields: dict[str, Any] = LLAMA, fill: float | None = 7.0, **sizes: Any) -> nn.Module:
    """A small model; all its parameters are ``fill``, or else random."""
    config = SimpleNamespace(
        **{
            "num_layers": LAYERS,
            "hidden_size": WIDTH,
            "ffn_hidden_size": 24,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 4,
            "layernorm_epsilon": 1e-5,
            "vocab_size": VOCAB,
            "seq_length": 16,
            "share_embeddings_and_output_weights": False,
        }
        | sizes
    )
    make = lambda: megatron.gpt(config, fields, position_embedding_type="rope")  # noqa: E731
    model = megatron.BACKEND.build(make).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(fill) if fill is not None else parameter.uniform_(-1, 1)
    return model


def write(model: nn.Module, folder: Path, front: str = "module.") -> Path:
    """What Megatron's own saver leaves of one process, but for its objects.

    It goes by what ``sharded_state_dict`` says, and by nothing of ours.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    whole: dict[str, torch.Tensor] = {}
    for part in model.sharded_state_dict(prefix=front).values():
        built = part.build() if isinstance(part, ShardedTensorFactory) else part
        for piece in built if isinstance(built, list) else [built]:
            if isinstance(piece, ShardedTensor):
                tensor = whole.setdefault(piece.key, torch.full(piece.global_shape, 9.0))
                axes = piece.prepend_axis_num
                place = tuple(
                    slice(o, o + s)
                    for o, s in zip(
                        piece.global_offset, (1,) * axes + tuple(piece.data.shape), strict=True
                    )
                )
                tensor[place] = piece.data.detach().view(tensor[place].shape)
    dcp.save(whole, checkpoint_id=folder / "weights", no_dist=True)
    return folder


def untouched(model: nn.Module) -> set[str]:
    return {key for key, value in model.named_parameters() if bool((value == 7).all())}


def assert_same(model: nn.Module, original: nn.Module) -> None:
    theirs = dict(original.named_parameters())
    for key, value in model.named_parameters():
        assert torch.equal(value, theirs[key]), key


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model that no saved config describes: all names come from the model itself."""
    torch.manual_seed(4)
    model = gpt(fill=None)
    return model, write(model, tmp_path_factory.mktemp("gpt"))


@pytest.mark.parametrize("front", ["module.", "", "model."])
@pytest.mark.parametrize("fields", [LLAMA, EXPERTS], ids=["dense", "experts"])
def test_a_model_is_loaded_by_the_names_that_it_has_on_disk_itself(tmp_path, front, fields):
    original = gpt(fields, fill=None)
    model = gpt(fields)
    load_weights_sharded_inplace_nemo2_to_mcore(model, write(original, tmp_path, front), set())
    assert_same(model, original)


def test_some_of_the_layers_may_be_skipped(saved):
    original, folder = saved
    model = gpt()
    load_weights_sharded_inplace_nemo2_to_mcore(
        model, folder, {"decoder.layers.1.", "output_layer"}
    )
    found = untouched(model)
    assert {key.rpartition(".layers.")[2][:2] for key in found} == {"1.", "ou"}
    assert torch.equal(
        model.decoder.layers[2].mlp.linear_fc1.weight,
        original.decoder.layers[2].mlp.linear_fc1.weight,
    )


@pytest.mark.parametrize(
    ("sizes", "prefixes", "said"),
    [
        ({"num_layers": 4}, (), r"lacks 'decoder\.layers\.3"),
        ({"num_layers": 2}, (), r"stored for 3 layers.*the model has 2"),
        ({"ffn_hidden_size": 32}, (), "linear_fc"),
        ({}, ("decoder.layerz",), "matches no parameter"),
    ],
)
def test_what_does_not_fit_is_an_error_and_nothing_is_loaded(saved, sizes, prefixes, said):
    _, folder = saved
    model = gpt(**sizes)
    with pytest.raises(PlanError, match=said):
        load_weights_sharded_inplace_nemo2_to_mcore(model, folder, prefixes)
    assert len(untouched(model)) == len(dict(model.named_parameters()))


def test_a_deeper_model_may_start_from_a_shallower_one(saved):
    _, folder = saved
    model = gpt(num_layers=4)
    load_weights_sharded_inplace_nemo2_to_mcore(model, folder, {"decoder.layers.3"})
    assert {key.split(".")[2] for key in untouched(model)} == {"3"}


@pytest.mark.parametrize("rows", [VOCAB + 8, VOCAB - 8])
def test_rows_of_the_vocabulary_may_be_more_or_less(saved, rows, caplog):
    original, folder = saved
    model = gpt(vocab_size=rows)
    load_weights_sharded_inplace_nemo2_to_mcore(model, folder, ())
    both = min(rows, VOCAB)
    for part in ("embedding.word_embeddings", "output_layer"):
        mine, theirs = (m.get_submodule(part).weight for m in (model, original))
        assert torch.equal(mine[:both], theirs[:both])
        assert not mine[both:].any()
    assert ("the last 8 rows are left out" in caplog.text) == (rows < VOCAB)


def test_a_parameter_that_is_not_contiguous_is_loaded(saved):
    original, folder = saved
    model = gpt()
    linear = model.decoder.layers[0].mlp.linear_fc2
    linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
    assert not linear.weight.is_contiguous()
    load_weights_sharded_inplace_nemo2_to_mcore(model, folder, ())
    assert torch.equal(linear.weight, original.decoder.layers[0].mlp.linear_fc2.weight)


def test_a_checkpoint_of_nemo_2_is_loaded(fixtures_dir):
    folder = fixtures_dir / "nemo2/llama_tp1"
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8}
    model = gpt(**sizes, kv_channels=8, vocab_size=128)
    load_weights_sharded_inplace_nemo2_to_mcore(model, folder, set())
    with open_checkpoint(folder) as stored:
        fused = stored.read("module.decoder.layers.mlp.linear_fc1.layer_norm_weight")
        assert torch.equal(model.decoder.layers[1].pre_mlp_layernorm.weight, fused[1])
        qkv = stored.read("module.decoder.layers.self_attention.linear_qkv.weight")
        assert torch.equal(model.decoder.layers[1].self_attention.linear_qkv.weight, qkv[1])


def test_a_zarr_checkpoint_is_loaded(fixtures_dir):
    folder = fixtures_dir / "zarr/gpt_fp32_tp1_mcore0.15.3"
    with open_checkpoint(folder) as stored:
        shapes = {name: tensor.shape for name, tensor in stored.tensors.items()}
        layers, rows, width = shapes["module.decoder.layers.self_attention.linear_proj.weight"]
        fields = {"add_bias_linear": True, "hidden_dropout": 0.0, "attention_dropout": 0.0}
        kind = stored.read("module.decoder.layers.mlp.linear_fc2.weight")
        fused = shapes["module.decoder.layers.self_attention.linear_qkv.weight"][1]
        sizes = {
            "num_layers": layers,
            "hidden_size": rows,
            "ffn_hidden_size": kind.shape[2],
            "num_attention_heads": 4,
            "kv_channels": width // 4,
            "num_query_groups": (fused - width) // (2 * (width // 4)),
            "vocab_size": shapes["module.embedding.word_embeddings.weight"][0],
            "share_embeddings_and_output_weights": "module.output_layer.weight" not in shapes,
        }
        gated = shapes["module.decoder.layers.mlp.linear_fc1.weight"][1] == 2 * kind.shape[2]
        is_layer_norm = "module.decoder.final_layernorm.bias" in shapes
        has_bias = "module.decoder.layers.mlp.linear_fc2.bias" in shapes
        fields |= {
            "gated_linear_unit": gated,
            "add_bias_linear": has_bias,
            "normalization": "LayerNorm" if is_layer_norm else "RMSNorm",
            "activation_func": "gelu",
        }
        model = gpt(fields, **sizes)
        skipped = {"embedding.position_embeddings"} & {
            key.rpartition(".")[0] for key, _ in model.named_parameters()
        }
        load_weights_sharded_inplace_nemo2_to_mcore(model, folder, skipped)
        assert torch.equal(model.decoder.layers[1].mlp.linear_fc2.weight, kind[1])


@dataclass
class Config(MegatronBioNeMoTrainableModelConfig, IOMixinWithGettersSetters):
    num_layers: int = 1
    hidden_size: int = 8
    num_attention_heads: int = 1
    model_cls: Any = None

    def configure_model(self) -> nn.Module:
        if self.initial_ckpt_path:
            self.load_settings_from_checkpoint(self.initial_ckpt_path)
        model: nn.Module = self.model_cls(self)
        if self.initial_ckpt_path:
            self.update_model_from_checkpoint(model, self.initial_ckpt_path)
        return model

    def get_loss_reduction_class(self) -> type:
        return nn.MSELoss


class Plain(megatron.imported("megatron.core.transformer.module").MegatronModule):  # type: ignore[misc]
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.body = nn.Linear(config.hidden_size, config.ffn_hidden_size)


class WithHead(Plain):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.head = nn.Linear(config.ffn_hidden_size, 2)


class Lightning(io.IOMixin):
    def __init__(self, config: Config) -> None:
        self.config = config


def test_a_module_of_megatron_with_parts_of_torch_goes_on_with_a_head(tmp_path):
    first = Config(hidden_size=12, model_cls=Plain)
    model = first.configure_model()
    state = {f"module.{key}": value for key, value in model.named_parameters()}
    dcp.save(state, checkpoint_id=tmp_path / "weights", no_dist=True)
    context = io.TrainerContext(model=Lightning(first), trainer=Lightning(None))
    context.io_dump(tmp_path / "context", yaml_attrs=["model"])
    second = Config(
        initial_ckpt_path=str(tmp_path),
        initial_ckpt_skip_keys_with_these_prefixes=["head"],
        model_cls=WithHead,
    )
    loaded = second.configure_model()
    assert (second.hidden_size, second.ffn_hidden_size, second.kv_channels) == (12, 48, 12)
    assert torch.equal(loaded.body.weight, model.body.weight)
    assert io.reinit(second).ffn_hidden_size == 48


@pytest.mark.filterwarnings("ignore::UserWarning:megatron")
@pytest.mark.parametrize(
    "more",
    [{}, {"num_moe_experts": 2, "params_dtype": torch.float16}, {"bf16": True}],
    ids=str,
)
def test_the_stand_in_has_the_fields_and_defaults_of_the_original(more):
    theirs = megatron.imported("megatron.core.transformer").TransformerConfig
    sizes = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 3} | more
    original, stand_in = theirs(**sizes), StandIn(**sizes)
    fields = {field.name: field for field in dataclasses.fields(theirs)}
    # What it draws first values with is megatron-core's own.
    drawn = {"init_method", "output_layer_init_method"}
    for field in dataclasses.fields(StandIn):
        assert field.default == fields[field.name].default, field.name
        if field.name not in drawn:
            assert getattr(stand_in, field.name) == getattr(original, field.name), field.name
    assert {field.name for field in dataclasses.fields(StandIn) if not field.init} == set()


@pytest.mark.parametrize(
    "fields", [{"fp16": True, "bf16": True}, {"tensor_model_parallel_size": 2}], ids=str
)
def test_the_stand_in_refuses_what_the_original_refuses(fields):
    theirs = megatron.imported("megatron.core.transformer").TransformerConfig
    for kind in (theirs, StandIn):
        with pytest.raises(ValueError):
            kind(**{"num_layers": 1, "hidden_size": 9, "num_attention_heads": 3} | fields)
