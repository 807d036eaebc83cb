"""Checkpoints loaded into models of megatron-core that are divided among processes."""

import importlib.util
import shutil
import warnings
from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bioinit
from bioinit.backends import megatron
from bioinit.errors import ConfigError, PlanError
from tests.megatron_shares import differing, place
from tests.processes import together

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(
        importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

ZARR = tuple(
    f"model.{field}={value}"
    for field, value in {
        "vocab_size": 64,
        "make_vocab_size_divisible_by": 64,
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "seq_length": 32,
        "share_embeddings_and_output_weights": "false",
    }.items()
)
"""What the checkpoint, which has no config, is of."""
SKIP_HEAD = "model.initial_ckpt_skip_keys_with_these_prefixes=[lm_head]"

ARGUMENTS = {
    "num_layers": 4,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "max_position_embeddings": 32,
    "swiglu": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "vocab_size": 21,
}
"""What Megatron-LM would say of the deep model."""

IDS = torch.arange(22).reshape(2, 11) % 20

LOADED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "llama": ("llama/causal_lm", "hf/llama/safetensors", ()),
    "nemo2": ("llama/causal_lm", "nemo2/llama_tp1", ()),
    "new head": ("llama/causal_lm", "hf/llama/safetensors", (SKIP_HEAD,)),
    "mixtral": ("mixtral/causal_lm", "hf/mixtral/safetensors", ()),
    "zarr": ("biobert/masked_lm", "zarr/bert_fp32_tp1_mcore0.12.3", ZARR),
    "tied": ("llama/causal_lm", "tied", ()),
    "bert": ("biobert/masked_lm", "bert", ()),
    "bert nemo2": ("biobert/masked_lm", "bert.nemo2", ()),
    "deep": ("llama/causal_lm", "deep", ()),
    "deep nemo2": ("llama/causal_lm", "deep.nemo2", ()),
    "deep zarr": ("llama/causal_lm", "deep.zarr", ()),
}
"""Recipe, checkpoint and more words, by the name of the case."""
DEEP = ("deep", "deep nemo2", "deep zarr")
"""One model with a layer for every chunk; the stacked ones were written by halves."""
DRAWN = {"new head": ("output_layer.weight",)}
"""What the checkpoint does not give."""

TIED = ("tied", "bert", "bert nemo2")
UNPADDED = ("tied", *DEEP)
"""What one process has no more rows of than there are words."""
ALL = ("llama", "new head", "mixtral", "zarr", *TIED, "deep nemo2", "deep zarr")
"""From every kind of checkpoint."""

LOADED_BY_TWO: tuple[tuple[dict[str, int], tuple[str, ...]], ...] = (
    ({"tp": 2}, (*ALL, "nemo2")),
    ({"pp": 2}, ALL),
    ({"pp": 2, "vpp": 2}, DEEP),
    ({"ep": 2}, ("mixtral",)),
)
LOADED_BY_FOUR: tuple[tuple[dict[str, int], tuple[str, ...]], ...] = (
    ({"tp": 2, "pp": 2}, ALL),
    ({"tp": 2, "pp": 1, "dp": 2}, ("llama", "bert")),
)


def start(case: str, where: Mapping[str, str], *words: str) -> nn.Module:
    recipe, source, more = LOADED[case]
    path = f"model.initial_ckpt_path={where[source]}"
    record = bioinit.compose(recipe, ["model.backend=megatron", path, *more, *words])
    return bioinit.initialize(record).model.eval()


def words_for(mesh: Mapping[str, int]) -> list[str]:
    axes = ", ".join(f"{axis}: {ways}" for axis, ways in mesh.items())
    return ["placement.strategy=megatron", f"placement.mesh={{{axes}}}"]


def computed(model: Any) -> torch.Tensor:
    """What this process computes of the logits, or its stage of the hidden states."""
    # Megatron compiles small parts, which takes longer than all else here.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        if type(model).__name__ == "BertModel":
            words = getattr(model, "embedding", None)
            has_types = getattr(words, "tokentype_embeddings", None) is not None
            types = torch.zeros_like(IDS) if has_types else None
            given = model(IDS, torch.ones_like(IDS), tokentype_ids=types)
            return given[0] if isinstance(given, tuple) else given
        return model(IDS, torch.arange(11).expand(IDS.shape), None)


def through_stages(model: Any, hidden_size: int) -> torch.Tensor | None:
    """The logits, with what the first stage gives handed to the second; None on the first."""
    given = torch.empty(11, 2, hidden_size)
    if model.pre_process:
        torch.distributed.send(computed(model).contiguous(), 1)
        return None
    torch.distributed.recv(given, 0)
    model.set_input_tensor(given)
    return computed(model)


def loads(meshes: Any, path: str, where: Mapping[str, str]) -> None:
    """Every cell of ``meshes`` in this rank."""
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state

    expected = torch.load(path)
    for mesh, cases in meshes:
        megatron.require_world(mesh)
        for case in cases:
            state, logits = expected[case]
            gated = LOADED[case][0] != "biobert/masked_lm"
            divisor = 1 if case in UNPADDED else 64 if case == "zarr" else 128
            asked = {"tied": case in TIED, "gated": gated, "divisor": divisor}
            with told_of_parts() as told:
                model = start(case, where, *words_for(mesh))
            assert told == [1] * mesh.get("vpp", 1), (mesh, case, told)
            held = {key: p.detach() for key, p in model.named_parameters()}
            wrong = differing(held, state, drawn=DRAWN.get(case, ()), **asked)
            assert not wrong, (mesh, case, wrong)
            if mesh == {"tp": 2} and case != "mixtral":
                here = computed(model)
                first = place().tp_rank * here.shape[-1]
                whole = logits[..., first : first + here.shape[-1]]
                torch.testing.assert_close(
                    here[..., : whole.shape[-1]], whole, atol=1e-5, rtol=1e-5
                )
            elif mesh == {"pp": 2}:
                here = through_stages(model, model.config.hidden_size)
                if here is not None:
                    torch.testing.assert_close(here, logits, atol=1e-5, rtol=1e-5)
            if case in ("tied", "mixtral", "bert", "deep", "deep nemo2"):
                source = LOADED[case][1]
                theirs_is_loaded(model, held, where["deep.lm" if source == "deep" else source])
        if "llama" in cases:
            model = start("llama", where, *words_for(mesh))
            what_cannot_be_planned_touches_nothing(where, model)
            a_failure_is_told(where["llama.nan"], model)
        parallel_state.destroy_model_parallel()


@contextmanager
def told_of_parts() -> Iterator[Collection[int]]:
    """How often each model was asked in here for its ``sharded_state_dict()``."""
    from megatron.core.models.common.language_module.language_module import LanguageModule

    asked: dict[nn.Module, int] = {}
    original = LanguageModule.sharded_state_dict

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked[self] = asked.get(self, 0) + 1
        return original(self, *args, **kwargs)

    LanguageModule.sharded_state_dict = counted
    found: list[int] = []
    try:
        yield found
    finally:
        LanguageModule.sharded_state_dict = original
        found.extend(asked.values())


def theirs_is_loaded(model: nn.Module, held: Mapping[str, torch.Tensor], source: str) -> None:
    """A model that somebody has, whose parameters lie transposed, gets the same in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() == 2:
                turned = nn.Parameter(torch.full_like(parameter.t().contiguous(), 7.0).t())
                vars(turned).update(vars(parameter))
                module._parameters[name] = turned
    was = {key: p.data_ptr() for key, p in model.named_parameters()}
    bioinit.load_weights(list(model) if isinstance(model, nn.ModuleList) else model, source)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter.detach(), held[key]), key
        assert parameter.data_ptr() == was[key], key


def what_cannot_be_planned_touches_nothing(where: Mapping[str, str], model: nn.Module) -> None:
    """The last norm is missing, which only the last stage has; or nothing says what is stacked."""
    was = {key: p.detach().clone() for key, p in model.named_parameters()}
    with pytest.raises(PlanError, match=r"final_layernorm\.weight"):
        bioinit.load_weights(model, where["llama.less"])
    with pytest.raises(ConfigError, match="Start the model by a recipe that gives its sizes"):
        bioinit.load_weights(model, where[LOADED["zarr"][1]])
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter.detach(), was[key]), key


def a_failure_is_told(source: str, model: nn.Module) -> None:
    """What cannot be loaded leaves a model on meta there, and says what it did to another."""
    with pytest.raises(PlanError, match="NaN") as caught:
        bioinit.load_weights(model, source, check_finite=True)
    assert "The module is not as it was" in caught.value.__notes__[0]
    bare = model.to("meta")
    with pytest.raises(PlanError, match="NaN"):
        bioinit.load_weights(bare, source, check_finite=True)
    assert all(parameter.is_meta for parameter in bare.parameters())


@pytest.fixture(scope="module")
def where(fixtures_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folders of checkpoints by the names in ``LOADED``."""
    transformers = pytest.importorskip("transformers")
    # Ranks need not import what writes.
    from tests.test_matrix import write_torch_dist, write_zarr

    found = {source: str(fixtures_dir / source) for _, source, _ in LOADED.values()}
    folder = tmp_path_factory.mktemp("written")
    common = {"vocab_size": 21, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4}
    common |= {"intermediate_size": 24, "max_position_embeddings": 32, "initializer_range": 0.2}
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(**common, num_key_value_heads=2, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(llama).save_pretrained(folder / "tied")
    bert = transformers.MegatronBertConfig(**common, tie_word_embeddings=True)
    transformers.MegatronBertForMaskedLM(bert).save_pretrained(folder / "bert")
    deep = transformers.LlamaConfig(**common, num_key_value_heads=2, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(deep).save_pretrained(folder / "deep")
    for name, write in (
        ("deep.nemo2", write_torch_dist),
        ("deep.zarr", write_zarr),
        ("bert.nemo2", write_torch_dist),
    ):
        converted = folder / f"{name}.whole"
        bioinit.convert(folder / name.partition(".")[0], converted, "nemo2")
        shutil.copytree(converted / "context", folder / name / "context")
        write(converted, folder / name / "weights")
    # As Megatron-LM writes it: the arguments of its run among the weights.
    shutil.copytree(folder / "deep.nemo2/weights", folder / "deep.lm")
    saved = {"args": Namespace(**ARGUMENTS), "checkpoint_version": 3.0, "iteration": 1}
    torch.save(saved, folder / "deep.lm/common.pt")
    spoiled = transformers.LlamaForCausalLM.from_pretrained(found["hf/llama/safetensors"])
    with torch.no_grad():
        for parameter in spoiled.parameters():
            parameter.view(-1)[0] = torch.nan
    spoiled.save_pretrained(folder / "llama.nan")
    del spoiled.model.norm
    spoiled.save_pretrained(folder / "llama.less")
    return found | {path.name: str(path) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def alone(where: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A file with what one process loads in each case, and computes with it."""
    found = {}
    for case in LOADED:
        model = start(case, where)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits = computed(model)
        found[case] = ({k: p.detach() for k, p in model.named_parameters()}, logits)
    path = tmp_path_factory.mktemp("alone") / "loaded.pt"
    torch.save(found, path)
    yield str(path)
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_two_processes_load_what_one_would(alone, where):
    together(2, loads, LOADED_BY_TWO, alone, where)


def test_four_processes_load_what_one_would(alone, where):
    together(4, loads, LOADED_BY_FOUR, alone, where)
