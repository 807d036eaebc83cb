"""A live model in another dialect than its builder's own: what is written, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import bioinit
from bioinit.cli import main
from bioinit.errors import ConfigError, PlanError
from bioinit.save import verify

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-6,
}
FRESH = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.vocab_size=100",
    "model.seq_length=32",
    "model.make_vocab_size_divisible_by=64",
)
EMBEDDING = "embedding.word_embeddings.weight"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron")


def write(folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """A checkpoint of a Llama whose values are all different."""
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **fields))
    with torch.no_grad():  # norms start as ones, which would hide a mix-up
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("llama") / "hf")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    """Whatever world megatron-core makes is gone after the tests."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    yield
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def start(path: Path | None, *words: str, recipe: str = "llama/causal_lm") -> Any:
    given = [] if path is None else [f"model.initial_ckpt_path={path}"]
    return bioinit.initialize(bioinit.compose(recipe, [*given, *words]))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with bioinit.open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


# What is written


def test_a_model_of_megatron_is_written_as_transformers_opens_it(
    world: None, llama: Path, tmp_path: Path
) -> None:
    words = ("model.backend=megatron", f"model.initial_ckpt_path={llama}")
    assert main(["init", "recipe=llama/causal_lm", *words, f"output_dir={tmp_path / 'out'}"]) == 0
    assert_same(
        load_file(llama / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    )
    first, second = (
        transformers.LlamaForCausalLM.from_pretrained(f) for f in (llama, tmp_path / "out")
    )
    assert_same(first.state_dict(), second.state_dict())
    differing = {k for k, v in first.config.to_dict().items() if second.config.to_dict()[k] != v}
    assert differing <= {"_name_or_path", "transformers_version"}
    assert (tmp_path / "out/tokenizer.json").read_text() == '{"version": "1.0"}'
    assert {entry["status"] for entry in verify(tmp_path / "out")} == {"unchanged"}


@pytest.mark.parametrize("backend", ["transformers", "megatron"])
def test_nemo2_output_is_what_a_conversion_writes_and_starts_the_next_run(
    request: pytest.FixtureRequest, llama: Path, tmp_path: Path, backend: str
) -> None:
    if backend == "megatron":
        request.getfixturevalue("world")
    words = (f"model.backend={backend}", "output.dialect=nemo2", f"output_dir={tmp_path / 'out'}")
    done = start(llama, *words)
    bioinit.convert(llama, tmp_path / "converted", "nemo2")
    assert_same(stored(tmp_path / "out"), stored(tmp_path / "converted"))
    ours, theirs = (
        json.loads((tmp_path / f / "context/io.json").read_text()) for f in ("out", "converted")
    )
    assert ours == theirs
    assert done.receipt["output"] == {"dialect": "nemo2", "format": "torch_dist"}
    assert not list((tmp_path / "out").rglob("journal"))
    again = start(tmp_path / "out")
    assert_same(dict(again.model.state_dict()), dict(start(llama).model.state_dict()))
    again.save(tmp_path / "back")
    assert_same(
        load_file(llama / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    )
    assert (tmp_path / "back/tokenizer.json").exists()


def test_megatron_core_itself_loads_what_its_own_model_was_written_as(
    world: None, llama: Path, tmp_path: Path
) -> None:
    start(llama, "model.backend=megatron", "output.dialect=nemo2", f"output_dir={tmp_path / 'out'}")
    done = subprocess.run(
        [sys.executable, HERE / "megatron_loads.py", tmp_path / "out/weights"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loaded 9 tensors and 12 extra states" in done.stdout


def test_what_was_trained_is_what_is_saved_wherever_its_memory_lies(
    llama: Path, tmp_path: Path
) -> None:
    done = start(llama, "output.dialect=nemo2")
    layer = done.model.model.layers[1].mlp.down_proj
    trained = torch.randn(48, 64)[:, ::2].t()  # neither contiguous nor dense
    layer.weight = torch.nn.Parameter(trained)
    done.save(tmp_path / "out")
    assert torch.equal(
        stored(tmp_path / "out")["module.decoder.layers.mlp.linear_fc2.weight"][1], trained
    )


def test_each_tensor_keeps_its_dtype_and_a_tied_head_is_written_once(
    world: None, tmp_path: Path
) -> None:
    source = write(tmp_path / "hf", torch.bfloat16, tie_word_embeddings=True)
    done = start(source, "model.backend=megatron")
    done.save(tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert_same(load_file(source / "model.safetensors"), found)
    assert "lm_head.weight" not in found and found["model.norm.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    start(source, "output.dialect=nemo2", f"output_dir={tmp_path / 'nemo2'}")
    written = stored(tmp_path / "nemo2")
    assert f"module.{EMBEDDING}" in written and "module.output_layer.weight" not in written
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


def test_layers_that_were_chosen_are_the_layers_that_are_written(
    llama: Path, tmp_path: Path
) -> None:
    asked = ("init.layers=[2,0]", "output.dialect=nemo2")
    start(llama, *asked, f"output_dir={tmp_path / 'out'}")
    again = start(tmp_path / "out").model.state_dict()
    whole = load_file(llama / "model.safetensors")
    name = "model.layers.{}.mlp.up_proj.weight"
    assert name.format(2) not in again
    for number, source in enumerate((2, 0)):
        assert torch.equal(again[name.format(number)], whole[name.format(source)])


def test_experts_and_encoders_find_their_place(fixtures_dir: Path, tmp_path: Path) -> None:
    for family, task, source in (
        ("mixtral", "causal_lm", "hf/mixtral/safetensors"),
        ("esm2", "masked_lm", "nemo2/esm2_tp2"),
    ):
        done = start(fixtures_dir / source, "output.dialect=nemo2", recipe=f"{family}/{task}")
        done.save(tmp_path / family)
        again = start(tmp_path / family, recipe=f"{family}/{task}")
        assert_same(dict(done.model.state_dict()), dict(again.model.state_dict()))


def test_a_fresh_model_of_megatron_is_saved_without_its_padding(
    world: None, tmp_path: Path
) -> None:
    done = start(None, "model.backend=megatron", *FRESH)
    live = done.model.state_dict()[EMBEDDING]
    assert live.shape == (128, 32) and live[:100].std() > 0
    done.save(tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(found["model.embed_tokens.weight"], live[:100])
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.shape == (100, 32)
    # Padding means nothing, so none of it is kept: what is written there is zero.
    start(
        tmp_path / "out",
        "output.dialect=nemo2",
        "model.make_vocab_size_divisible_by=64",
        f"output_dir={tmp_path / 'nemo2'}",
    )
    padded = stored(tmp_path / "nemo2")[f"module.{EMBEDDING}"]
    assert torch.equal(padded[:100], live[:100]) and not padded[100:].any()


def test_megatron_gives_first_values_to_what_a_checkpoint_lacks(
    world: None, llama: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    lacking = tmp_path / "lacking"
    lacking.mkdir()
    (lacking / "config.json").write_text((llama / "config.json").read_text())
    state = load_file(llama / "model.safetensors")
    gone = state.pop("lm_head.weight")
    save_file(state, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError, match=r"output_layer\.weight"):
        start(lacking, "model.backend=megatron")
    done = start(lacking, "model.backend=megatron", "init.on_missing=init", "init.seed=3")
    done.save(tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    head = found.pop("lm_head.weight")
    assert head.std() > 0 and not torch.equal(head, gone)
    assert_same(state, found)


def test_hf_of_transformers_is_still_what_save_pretrained_writes(
    llama: Path, tmp_path: Path
) -> None:
    done = start(llama, "output.format=safetensors")
    done.save(tmp_path / "out")
    done.model.save_pretrained(tmp_path / "own")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()


def test_another_format_holds_the_same_names(llama: Path, tmp_path: Path) -> None:
    start(llama, "output.format=torch_dist", f"output_dir={tmp_path / 'out'}")
    with bioinit.open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.format == "torch_dist" and checkpoint.dialect == "hf"
    assert_same(stored(tmp_path / "out"), stored(llama))


# What is refused


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("sequence_classification", {"score.weight", "output_layer.weight"}),
        ("token_classification", {"score.weight", "score.bias", "output_layer.weight"}),
    ],
)
def test_a_head_without_a_home_is_refused_before_weights_are_read(
    llama: Path, tmp_path: Path, task: str, names: set[str]
) -> None:
    record = bioinit.compose(
        f"llama/{task}",
        [
            f"model.initial_ckpt_path={llama}",
            "output.dialect=nemo2",
            f"output_dir={tmp_path / 'o'}",
        ],
    )
    assert {problem.key for problem in bioinit.plan(record).problems} == names
    read = []
    with pytest.raises(PlanError, match=r"score\.weight.*nemo2.*output\.dialect=hf"):
        bioinit.initialize(record, lambda done, total: read.append(done))
    assert not read and not (tmp_path / "o").exists()


def test_what_somebody_added_to_the_model_is_named_and_nothing_is_left(
    llama: Path, tmp_path: Path
) -> None:
    done = start(llama, "output.dialect=nemo2")
    done.model.model.register_parameter("adapter", torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(PlanError, match=r"model\.adapter.*no home in nemo2"):
        done.save(tmp_path / "out")
    assert not list(tmp_path.iterdir()) and done.receipt is None


def test_what_the_other_world_takes_for_zero_must_be_zero(tmp_path: Path) -> None:
    words = ("num_layers=1", "hidden_size=16", "ffn_hidden_size=24", "num_attention_heads=4")
    fields = [f"model.{word}" for word in (*words, "vocab_size=30", "seq_length=16")]
    done = start(None, *fields, "output.dialect=nemo2", recipe="biobert/masked_lm")
    name = "bert.embeddings.token_type_embeddings.weight"
    types = done.model.get_parameter(name)
    with torch.no_grad():
        types.zero_()[-1, -1] = 1e-30
    with pytest.raises(PlanError, match=rf"{name}' is not zero"):
        done.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with torch.no_grad():
        types.zero_()
    done.save(tmp_path / "out")
    again = start(tmp_path / "out", recipe="biobert/masked_lm")
    assert_same(dict(done.model.state_dict()), dict(again.model.state_dict()))


def test_a_field_that_the_world_cannot_say_is_refused_with_the_plan(
    llama: Path, tmp_path: Path
) -> None:
    source = write(tmp_path / "hf", attention_bias=True)
    with pytest.raises(ConfigError, match=r"add_attention_bias.*add_mlp_bias"):
        bioinit.plan(
            bioinit.compose(
                "llama/causal_lm", [f"model.initial_ckpt_path={source}", "output.dialect=nemo2"]
            )
        )


@pytest.mark.parametrize(
    ("recipe", "words", "says"),
    [
        ("llama/causal_lm", ["output.dialect=nemo"], "cannot be written.*Choose from hf, nemo2"),
        ("llama/causal_lm", ["output.dialect=neox"], "'llama' cannot be written.*neox"),
        ("llama/causal_lm", ["output.format=zarr"], "nothing is written in the format 'zarr'"),
        ("auto/as_saved", ["output.dialect=nemo2"], "'auto' has no tables of other worlds"),
    ],
)
def test_worlds_and_formats_that_are_not_written_are_refused_with_the_plan(
    llama: Path, recipe: str, words: list[str], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        bioinit.plan(bioinit.compose(recipe, [f"model.initial_ckpt_path={llama}", *words]))


@dataclass(kw_only=True)
class Own(bioinit.TrainableModelConfig):
    def configure_model(self) -> torch.nn.Module:
        return torch.nn.Linear(2, 2)


def test_a_module_of_ones_own_has_no_other_world() -> None:
    from bioinit.config import Output, Run
    from bioinit.record import make_record

    record = make_record(Run, {"output": Output(dialect="nemo2")})
    record.model = make_record(Own, {}, at="model")
    with pytest.raises(ConfigError, match="'Own' has no tables of other worlds"):
        bioinit.plan(record)
