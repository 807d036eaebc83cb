"""From one world into another and back: values, fields, files, and what happens half-way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp

import bioinit
from bioinit import families
from bioinit.cli import main
from bioinit.convert.models import check_model_id
from bioinit.convert.work import digest_of
from bioinit.errors import (
    BioinitError,
    ConfigError,
    PlanError,
    RefusedCheckpoint,
    StorageError,
    UnknownFormat,
)
from bioinit.formats import _filling
from bioinit.load.stream import Stream
from bioinit.mapping import Conversion
from bioinit.save import verify

HERE = Path(__file__).parent
CONFIG = transformers.LlamaConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=3e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 12345.0},
    bos_token_id=7,
    eos_token_id=8,
    use_cache=False,
)


def model_of(config: transformers.LlamaConfig) -> torch.nn.Module:
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # norms start as ones, which would hide a mix-up
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def logits(folder: Path) -> torch.Tensor:
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(12)[None] % 100).logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "hf"
    model = model_of(CONFIG)
    model.generation_config.max_length = 17
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def nemo(llama: Path) -> Path:
    folder = llama.parent / "nemo2"
    bioinit.convert(llama, folder, "nemo2")
    return folder


@pytest.fixture
def own(llama: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "own"))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def say(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def left_beside(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if path.name.startswith(".")]


# There and back


def test_hf_to_nemo2_and_back_is_the_same_model(llama: Path, nemo: Path, tmp_path: Path):
    bioinit.convert(nemo, tmp_path / "back", "hf")
    before, after = (load_file(f / "model.safetensors") for f in (llama, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(llama), logits(tmp_path / "back"))
    first, second = (
        transformers.AutoConfig.from_pretrained(f).to_dict() for f in (llama, tmp_path / "back")
    )
    unimportant = {"_name_or_path", "transformers_version"}
    differing = {k for k in first if first[k] != second.get(k)} - unimportant
    assert not differing


def test_what_only_one_world_knows_comes_back_from_the_sidecar_and_only_from_there(
    nemo: Path, tmp_path: Path
):
    forgetful = Path(shutil.copytree(nemo, tmp_path / "forgetful"))
    (forgetful / "context/bioinit.json").unlink()
    bioinit.convert(forgetful, tmp_path / "back", "hf")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "back")
    assert (config.bos_token_id, config.use_cache) == (1, True)
    assert config.rms_norm_eps == 3e-6 and config.rope_parameters["rope_theta"] == 12345.0
    assert (config.vocab_size, config.num_key_value_heads) == (100, 2)
    carried = json.loads((nemo / "context/bioinit.json").read_text())["carried"]
    assert carried["hf"]["bos_token_id"] == 7


def test_files_that_go_along_come_back_under_their_names(llama: Path, nemo: Path, tmp_path: Path):
    assert (nemo / "context/nemo_tokenizer/tokenizer.json").exists()
    bioinit.convert(nemo, tmp_path / "back", "hf")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (llama / name).read_bytes()


def test_a_tokenizer_that_is_given_takes_the_place_of_the_sources(llama: Path, tmp_path: Path):
    (tmp_path / "spm").mkdir()
    (tmp_path / "spm/tokenizer.model").write_bytes(b"pieces")
    bioinit.convert(llama, tmp_path / "out", "nemo2", tokenizer=tmp_path / "spm")
    assert (tmp_path / "out/context/tokenizer.model").read_bytes() == b"pieces"
    assert not (tmp_path / "out/context/nemo_tokenizer").exists()
    model = bioinit.load_context(tmp_path / "out", "model")
    assert model["tokenizer"]["model_path"] == "context/tokenizer.model"
    with pytest.raises(StorageError, match="holds no tokenizer"):
        bioinit.convert(llama, tmp_path / "no", tokenizer=tmp_path / "out")


def test_the_receipt_lists_what_was_written(nemo: Path, tmp_path: Path):
    names = {entry["path"] for entry in verify(nemo)}
    assert {"weights/.metadata", "context/io.json", "context/bioinit.json"} <= names
    assert not {name for name in names if "journal" in name}
    receipt = json.loads((nemo / "receipt.json").read_text())
    assert receipt["checkpoint"]["dialect"] == "hf"
    assert receipt["output"] == {"dialect": "nemo2", "format": "torch_dist"}
    fates = {field["name"]: field["fate"] for field in receipt["source_fields"]}
    assert fates["bos_token_id"] == "carried" and fates["hidden_size"] == "mapped"


def test_the_vocabulary_is_padded_with_zeros_and_the_padding_is_dropped_again(
    llama: Path, tmp_path: Path
):
    bioinit.convert(llama, tmp_path / "nemo2", "nemo2", set={"make_vocab_size_divisible_by": 64})
    stored = load_file(llama / "model.safetensors")["model.embed_tokens.weight"]
    with bioinit.open_checkpoint(tmp_path / "nemo2") as checkpoint:
        padded = checkpoint.read("module.embedding.word_embeddings.weight")
    assert padded.shape == (128, 32)
    assert torch.equal(padded[:100], stored) and not padded[100:].any()
    bioinit.convert(tmp_path / "nemo2", tmp_path / "back", "hf")
    back = load_file(tmp_path / "back/model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(back, stored)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_plain_dcp_opens_what_was_written(nemo: Path):
    with bioinit.open_checkpoint(nemo) as checkpoint:
        wanted = {name: checkpoint.read(name) for name in checkpoint.tensors}
    state = {name: torch.empty_like(tensor) for name, tensor in wanted.items()}
    dcp.load(state, checkpoint_id=str(nemo / "weights"), no_dist=True)
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_megatron_core_itself_loads_what_was_written(nemo: Path):
    pytest.importorskip("megatron.core")
    done = subprocess.run(
        [sys.executable, HERE / "megatron_loads.py", nemo / "weights"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loaded 9 tensors and 12 extra states" in done.stdout


# What the original software wrote


def test_the_fixture_of_nemo_is_the_fixture_of_transformers(fixtures_dir: Path, tmp_path: Path):
    bioinit.convert(fixtures_dir / "nemo2/llama_tp1", tmp_path / "hf", "hf")
    wanted = load_file(fixtures_dir / "hf/llama/safetensors/model.safetensors")
    found = load_file(tmp_path / "hf/model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    bioinit.convert(fixtures_dir / "hf/llama/safetensors", tmp_path / "nemo2", "nemo2")
    with (
        bioinit.open_checkpoint(fixtures_dir / "nemo2/llama_tp1") as theirs,
        bioinit.open_checkpoint(tmp_path / "nemo2") as ours,
    ):
        assert theirs.tensors.keys() == ours.tensors.keys()
        assert theirs.metadata["byte_objects"] == ours.metadata["byte_objects"]
        assert all(torch.equal(theirs.read(n), ours.read(n)) for n in theirs.tensors)


def test_partitions_of_neox_are_described_by_the_config_of_another_world(
    fixtures_dir: Path, tmp_path: Path
):
    source = fixtures_dir / "gpt_neox/global_step10"
    with pytest.raises(BioinitError):
        bioinit.convert(source, tmp_path / "no", "hf", family="llama")
    config = fixtures_dir / "hf/gpt_neox/safetensors/config.json"
    bioinit.convert(source, tmp_path / "hf", "hf", config=config)
    wanted = load_file(config.with_name("model.safetensors"))
    found = load_file(tmp_path / "hf/model.safetensors")
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], atol=1e-6, rtol=0)


# What a person says


_COMPUTES = {
    "activation_func": "silu",
    "seq_length": 128,
    "layernorm_epsilon": 1e-5,
    "share_embeddings_and_output_weights": False,
    "rotary_base": 10000.0,
    "rope_type": "default",
}


def test_what_shapes_do_not_prove_is_asked_for_at_once(own: Path, tmp_path: Path):
    (own / "config.json").unlink()
    given = {"num_query_groups": 2, "hidden_size": 32, "vocab_size": 100}
    with pytest.raises(ConfigError) as caught:
        bioinit.convert(own, tmp_path / "no", "nemo2", family="llama", set=given)
    said = str(caught.value)
    for name in ("num_attention_heads", *_COMPUTES):
        assert f"--set {name}=" in said
    assert "init_method_std" not in said and "dropout" not in said and "--config FILE" in said
    assert "prove ffn_hidden_size=48, num_layers=3." in said
    whole = {**_COMPUTES, "num_attention_heads": 4, "num_query_groups": 2}
    found = bioinit.convert(own, tmp_path / "out", "nemo2", family="llama", set=whole)
    assert bioinit.load_context(tmp_path / "out", "model.config.num_layers") == 3
    assert any("assumed init_method_std=0.02" in note for note in found.plan.notes)
    assert any("prove vocab_size=100, hidden_size=32" in note for note in found.plan.notes)


def test_the_few_arguments_of_deepspeed_do_not_say_what_neox_computes(
    fixtures_dir: Path, tmp_path: Path
):
    source = fixtures_dir / "gpt_neox"
    for given in ({}, {"hidden_size": 64}):
        with pytest.raises(ConfigError, match=r"num_attention_heads, seq_length.*--config FILE"):
            bioinit.convert(source, tmp_path / "no", "hf", set=given)
    heads = {**_COMPUTES, "num_attention_heads": 4, "rotary_percent": 0.25}
    heads |= {"activation_func": "gelu", "use_parallel_residual": True}
    bioinit.convert(source, tmp_path / "out", "hf", set=heads)
    config = json.loads((tmp_path / "out/config.json").read_text())
    wanted = json.loads((fixtures_dir / "hf/gpt_neox/safetensors/config.json").read_text())
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert config[name] == wanted[name]


def test_bare_weights_need_a_config_or_a_family(own: Path, tmp_path: Path, llama: Path):
    (own / "config.json").unlink()
    with pytest.raises(BioinitError, match=r"--config FILE") as caught:
        bioinit.convert(own, tmp_path / "no", "nemo2")
    assert caught.value.exit_code in (2, 3)
    found = bioinit.convert(own, tmp_path / "out", "nemo2", config=llama / "config.json")
    assert found.receipt["output"]["dialect"] == "nemo2"
    given = {
        "vocab_size": 100,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_layers": 3,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        **_COMPUTES,
    }
    bioinit.convert(own, tmp_path / "told", "nemo2", family="llama", set=given)
    with (
        bioinit.open_checkpoint(tmp_path / "out") as one,
        bioinit.open_checkpoint(tmp_path / "told") as other,
    ):
        assert all(torch.equal(one.read(n), other.read(n)) for n in one.tensors)


def test_a_saved_config_may_have_any_name(own: Path, tmp_path: Path):
    (own / "config.json").rename(tmp_path / "notes-on-llama.json")
    bioinit.convert(own, tmp_path / "out", config=tmp_path / "notes-on-llama.json")
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 100
    (tmp_path / "else.txt").write_text("nothing")
    with pytest.raises(UnknownFormat, match=r"else\.txt is no saved config"):
        bioinit.convert(own, tmp_path / "no", config=tmp_path / "else.txt")


def test_a_field_on_top_of_what_is_saved_counts_and_is_judged(llama: Path, tmp_path: Path):
    bioinit.convert(llama, tmp_path / "out", "nemo2", set={"seq_length": 77})
    assert bioinit.load_context(tmp_path / "out", "model.config.seq_length") == 77
    with pytest.raises(ConfigError, match=r"hidden_sise.*hidden_size"):
        bioinit.convert(llama, tmp_path / "no", set={"hidden_sise": 32})
    with pytest.raises(PlanError, match=r"--set FIELD=VALUE"):
        bioinit.convert(llama, tmp_path / "no", set={"ffn_hidden_size": 64})
    assert not (tmp_path / "no").exists() and not left_beside(tmp_path / "no")


def test_tensors_keep_their_dtypes_unless_another_is_asked_for(own: Path, tmp_path: Path):
    def edit(state: dict[str, torch.Tensor]) -> None:
        for name in state:
            if "norm" not in name:
                state[name] = state[name].to(torch.bfloat16)

    change(own, edit)
    bioinit.convert(own, tmp_path / "kept", "nemo2")
    with bioinit.open_checkpoint(tmp_path / "kept") as checkpoint:
        found = {n: t.dtype for n, t in checkpoint.tensors.items()}
    assert {n for n, d in found.items() if d == torch.float32} == {n for n in found if "norm" in n}
    config = bioinit.load_context(tmp_path / "kept", "model.config")
    assert (config["params_dtype"], config["bf16"]) == ("torch.bfloat16", True)
    bioinit.convert(tmp_path / "kept", tmp_path / "half", "hf", dtype="float16")
    half = load_file(tmp_path / "half/model.safetensors")
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    said = json.loads((tmp_path / "half/config.json").read_text())
    assert said["dtype"] == "float16"


def test_a_published_model_is_held_against_its_preset(llama: Path, tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        bioinit.convert(llama, tmp_path / "no", model_id="meta-llama/Llama-2-7b-hf")
    for said in ("hidden_size is 32, the preset has 4096", "vocab_size is 100", "num_layers is 3"):
        assert said in str(caught.value)
    with pytest.raises(ConfigError, match="none of the published"):
        bioinit.convert(llama, tmp_path / "no", model_id="meta-llama/Llama-9")
    with pytest.raises(ConfigError, match="family 'mixtral'"):
        bioinit.convert(llama, tmp_path / "no", model_id="mistralai/Mixtral-8x7B-v0.1")


def test_shards_are_no_larger_than_asked_for(llama: Path, tmp_path: Path):
    bioinit.convert(llama, tmp_path / "out", max_shard_size="20KB")
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 25_000
    assert torch.equal(logits(tmp_path / "out"), logits(llama))
    for wrong in ("5 bananas", "0", 0, "9" * 5000):
        with pytest.raises(ConfigError, match="is no size"):
            bioinit.convert(llama, tmp_path / "no", max_shard_size=wrong)


def test_a_class_that_nobody_knows_is_told_with_the_one_that_takes_its_place(
    own: Path, tmp_path: Path
):
    say(own, architectures=["LlamaForSpecialThing"])
    notes = bioinit.convert(own, tmp_path / "out", "nemo2").plan.notes
    assert any("LlamaForSpecialThing" in note and "causal_lm" in note for note in notes)


@pytest.mark.parametrize(
    "to, option",
    [("hf", {"partitions": 4}), ("nemo2", {"partitions": 2}), ("nemo2", {"max_shard_size": "1GB"})],
)
def test_an_option_that_the_format_does_not_look_at_is_refused(
    llama: Path, tmp_path: Path, to: str, option: dict[str, Any]
):
    with pytest.raises(ConfigError, match="means nothing to the format"):
        bioinit.convert(llama, tmp_path / "no", to, **option)
    assert not (tmp_path / "no").exists()


def test_a_model_that_no_family_knows_changes_its_dtype_and_nothing_else(tmp_path: Path):
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    bioinit.convert(tmp_path / "gpt2", tmp_path / "out", "hf", dtype="bfloat16")
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("gpt2", "out"))
    assert all(torch.equal(before[n].bfloat16(), after[n]) for n in before)
    assert before.keys() == after.keys()
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="no tables of other worlds"):
        bioinit.convert(tmp_path / "gpt2", tmp_path / "no", "nemo2")


# What does not fit


def test_a_source_that_nobody_claims_is_an_error_with_its_name(own: Path, tmp_path: Path):
    change(own, lambda state: state.update({"model.strange.weight": torch.ones(3)}))
    with pytest.raises(PlanError, match=r"'model\.strange\.weight' \[3\].*--drop model\.strange"):
        bioinit.convert(own, tmp_path / "out", "nemo2")
    bioinit.convert(own, tmp_path / "out", "nemo2", drop=["model.strange"])
    with pytest.raises(PlanError, match="matches no"):
        bioinit.convert(own, tmp_path / "no", "nemo2", drop=["model.strange", "nothing"])


@pytest.mark.parametrize(
    "edit, what",
    [
        (lambda s: s.pop("model.layers.1.mlp.up_proj.weight"), r"mlp\.linear_fc1\.weight"),
        (lambda s: s.update({"lm_head.weight": s["lm_head.weight"][:90].clone()}), "output_layer"),
        (
            lambda s: s.update({"model.norm.weight": s["model.norm.weight"][:8].clone()}),
            "final_layernorm",
        ),
        (
            lambda s: s.update(
                {"model.layers.3.input_layernorm.weight": s["model.norm.weight"].clone()}
            ),
            r"layers\.3",
        ),
    ],
    ids=["a layer with a gap", "fewer tokens", "another width", "one layer too many"],
)
def test_weights_that_are_not_what_the_config_says_are_refused_before_anything_is_written(
    own: Path, tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], Any], what: str
):
    change(own, edit)
    with pytest.raises(PlanError, match=what):
        bioinit.convert(own, tmp_path / "out", "nemo2")
    assert not (tmp_path / "out").exists() and not left_beside(tmp_path / "out")


def test_copies_of_a_tied_tensor_are_compared(own: Path, tmp_path: Path):
    say(own, tie_word_embeddings=True)
    with pytest.raises(PlanError, match="stored more than once and the copies differ"):
        bioinit.convert(own, tmp_path / "out", "nemo2")
    assert not (tmp_path / "out").exists() and not left_beside(tmp_path / "out")
    change(own, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}))
    bioinit.convert(own, tmp_path / "out", "nemo2")
    with bioinit.open_checkpoint(tmp_path / "out") as checkpoint:
        assert not any("output_layer" in name for name in checkpoint.tensors)


def test_what_stands_at_the_destination_is_left_alone(llama: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("mine")
    with pytest.raises(StorageError, match=r"not empty.*replaced with --overwrite"):
        bioinit.convert(llama, tmp_path / "out")
    with pytest.raises(StorageError, match=r"the checkpoint.*Choose another destination"):
        bioinit.convert(llama, llama, overwrite=True)
    assert (tmp_path / "out/precious").read_text() == "mine"
    bioinit.convert(llama, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out/precious").exists() and not left_beside(tmp_path / "out")


@pytest.mark.parametrize("what", ["config", "tokenizer"])
def test_what_is_read_beside_the_source_is_not_replaced(llama: Path, tmp_path: Path, what: str):
    out = Path(shutil.copytree(llama, tmp_path / "out"))
    given = {"config": out / "config.json", "tokenizer": out}[what]
    with pytest.raises(StorageError, match=r"(is|holds) the checkpoint"):
        bioinit.convert(llama, out, overwrite=True, **{what: given})
    assert (out / "tokenizer.json").exists()


def test_the_hidden_folder_is_used_only_if_it_is_ours(llama: Path, tmp_path: Path):
    hidden = tmp_path / ".out.converting"
    source = Path(shutil.copytree(llama, hidden))
    with pytest.raises(StorageError, match=r"\.out\.converting: it is .* being read"):
        bioinit.convert(source, tmp_path / "out")
    with pytest.raises(StorageError, match=r"\.out\.converting: unfinished work goes there"):
        bioinit.convert(llama, tmp_path / "out")
    assert (source / "model.safetensors").exists()
    shutil.rmtree(hidden)
    hidden.write_text("a file")
    with pytest.raises(StorageError, match=r"\.out\.converting: unfinished work goes there"):
        bioinit.convert(llama, tmp_path / "out")
    hidden.unlink()
    hidden.mkdir()  # as a process leaves it that was killed at once
    bioinit.convert(llama, tmp_path / "out")
    assert not left_beside(tmp_path / "out")


def test_a_full_disk_leaves_nothing_behind(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match=r"(?i)no space"):
        bioinit.convert(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not left_beside(tmp_path / "out")


# Half-way


KILLED = """
import os, signal, sys, bioinit
def progress(done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
bioinit.convert(sys.argv[1], sys.argv[2], "hf", max_shard_size="4KB", progress=progress)
"""


def test_a_killed_conversion_goes_on_where_it_was(llama: Path, tmp_path: Path):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, llama, out],
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
    )
    assert done.returncode == -signal.SIGKILL
    assert not out.exists() and ".out.converting" in left_beside(out)
    again = bioinit.convert(llama, out, "hf", max_shard_size="4KB")
    total = again.plan.bytes_to_read
    assert 0 < again.receipt["bytes_read"] < 0.75 * total
    assert torch.equal(logits(out), logits(llama))
    assert verify(out) and not left_beside(out)


def test_other_work_does_not_go_on_with_what_was_left(llama: Path, tmp_path: Path):
    class Enough(KeyboardInterrupt):
        pass

    def progress(done: int, total: int) -> None:
        if done > total / 2:
            raise Enough

    out = tmp_path / "out"
    with pytest.raises(Enough):
        bioinit.convert(llama, out, "hf", max_shard_size="4KB", progress=progress)
    assert ".out.converting" in left_beside(out)
    again = bioinit.convert(llama, out, "hf", max_shard_size="4KB", dtype="bfloat16")
    assert again.receipt["bytes_read"] >= again.plan.bytes_to_read
    assert {t.dtype for f in out.glob("*.safetensors") for t in load_file(f).values()} == {
        torch.bfloat16
    }
    assert not left_beside(out)


class Enough(KeyboardInterrupt):
    """A person stops a conversion half-way."""


def stop_half_way(done: int, total: int) -> None:
    if done > total / 2:
        raise Enough


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    with bioinit.open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def test_the_same_names_out_of_other_elements_are_other_work(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[Any, ...]] = []
    room = sys.modules["bioinit.convert.decided"]
    monkeypatch.setattr(room, "digest_of", lambda *given: seen.append(given) or digest_of(*given))
    bioinit.convert(llama, tmp_path / "out", "nemo2")
    [(source, options, given, plan, side, tensors)] = seen

    def other(**changes: Any) -> str:
        key, target = next(iter(plan.targets.items()))
        moved = [copy._replace(**changes) for copy in target.copies] if "add" in changes else ()
        changed = target._replace(**({"copies": tuple(moved)} if moved else changes))
        return digest_of(
            *(source, options, given),
            replace(plan, targets={**plan.targets, key: changed}),
            *(side, tensors),
        )

    first = next(iter(plan.targets.values()))
    same = digest_of(*seen[0])
    assert same == digest_of(*seen[0])
    conversion = Conversion(("a",), ("b",), dict, "a function")  # type: ignore[arg-type]
    found = [
        same,
        other(add=1.0),
        other(padded=not first.padded),
        other(copies=first.copies[1:]),
        other(conversion=conversion),
        other(conversion=conversion),  # nobody knows whether the function is the same
        digest_of(source, options, {"a": 1}, plan, side, tensors),
    ]
    assert len(set(found)) == len(found)


def test_another_tokenizer_is_other_work(llama: Path, tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text("{}")
    (tmp_path / "one/vocab.txt").write_text("a")
    out = tmp_path / "out"

    def ask(which: str, progress: Any = None) -> Any:
        return bioinit.convert(
            llama, out, "hf", tokenizer=tmp_path / which, max_shard_size="4KB", progress=progress
        )

    with pytest.raises(Enough):
        ask("one", stop_half_way)
    (tmp_path / ".out.converting/vocab.txt").write_text("a")  # as if it was stopped a bit later
    ask("two")
    assert not (out / "vocab.txt").exists()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "evil.py", "journal", "context/io.json", "../up"]
)
def test_a_sidecar_cannot_put_a_file_in_the_place_of_weights_or_of_a_config(
    nemo: Path, tmp_path: Path, name: str
):
    evil = Path(shutil.copytree(nemo, tmp_path / "evil"))
    sidecar = evil / "context/bioinit.json"
    (evil / "context/evil.bin").write_bytes(b"evil")
    document = json.loads(sidecar.read_text())
    document["files"][name] = "context/evil.bin"
    sidecar.write_text(json.dumps(document))
    with pytest.raises(RefusedCheckpoint, match="could stand for weights"):
        bioinit.convert(evil, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


def test_no_tensor_is_ever_whole_in_memory(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[int] = []
    outgoing = Stream.outgoing

    def noted(self: Stream, *given: Any) -> Any:
        def watched(fill: Any) -> Any:
            def one(first: int, memory: torch.Tensor) -> None:
                asked.append(memory.nbytes)
                fill(first, memory)

            return one

        return [t._replace(fill=watched(t.fill)) for t in outgoing(self, *given)]

    monkeypatch.setattr(Stream, "outgoing", noted)
    for module in (_filling, sys.modules["bioinit.formats.safetensors.shards"]):
        monkeypatch.setattr(module, "SLAB_BYTES", 512)
    bioinit.convert(llama, tmp_path / "out")
    largest = max(t.nbytes for t in load_file(llama / "model.safetensors").values())
    assert max(asked) <= 512 < largest
    assert torch.equal(logits(tmp_path / "out"), logits(llama))


# The command line


def test_the_command_line_prints_one_document_and_gives_exit_codes(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = str(tmp_path / "out")
    words = ["convert", str(llama), out, "--to", "nemo2", "--json", "--set", "seq_length=99"]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["output"]["dialect"] == "nemo2" and document["problems"] == []
    assert main(words) == StorageError.exit_code
    elsewhere = str(tmp_path / "elsewhere")
    assert main(["convert", str(llama), elsewhere, "--to", "klingon"]) == ConfigError.exit_code
    assert "Choose from" in capsys.readouterr().err
    wrong = ["--set", "hidden_size=64", "--overwrite"]
    assert main(["convert", str(llama), out, "--to", "nemo2", *wrong]) == PlanError.exit_code
    assert main(["convert", out, str(tmp_path / "back"), "--to", "hf", "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert "written" in said and "cast float32 -> bfloat16" in said


def test_differences_of_training_alone_are_said_and_are_no_error():
    config = families.load("llama").config(
        seq_length=2048, ffn_hidden_size=11008, layernorm_epsilon=1e-5
    )
    said = check_model_id("meta-llama/Llama-2-7b-hf", SimpleNamespace(name="llama", config=config))
    assert said == ("not as meta-llama/Llama-2-7b-hf: seq_length is 2048, the preset has 4096",)


def test_what_fills_a_tensor_and_what_does_not_fit_are_named_as_they_are_stored(
    llama: Path, tmp_path: Path
):
    found = bioinit.convert(llama, tmp_path / "out", "nemo2")
    rules = {claim.key: claim.rule for claim in found.plan.tensors}
    qkv = rules["decoder.layers.self_attention.linear_qkv.weight"]
    assert qkv.startswith("view model.layers.*.self_attn.{q_proj,k_proj,v_proj}.weight -> ")
    back = bioinit.convert(tmp_path / "out", tmp_path / "back").plan.tensors
    assert all("part of" in claim.rule for claim in back if ".q_proj" in claim.key)
    with pytest.raises(PlanError, match=r"'model\.layers\.0\.mlp\.down_proj\.weight' is stored as"):
        bioinit.convert(llama, tmp_path / "no", "nemo2", set={"ffn_hidden_size": 64})
    assert len(repr(found)) < 300 and str(found.path) in repr(found)
    assert "9 loaded" in repr(found.plan) and len(repr(found.plan)) < 300


def test_values_that_a_narrower_dtype_cannot_hold_are_not_lost(llama: Path, tmp_path: Path):
    shutil.copytree(llama, tmp_path / "large")
    state = load_file(llama / "model.safetensors")
    state["model.norm.weight"][0] = 1e6
    save_file(state, tmp_path / "large/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError, match=r"model\.norm\.weight.*float16 cannot"):
        bioinit.convert(tmp_path / "large", tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()
    bioinit.convert(tmp_path / "large", tmp_path / "brain", dtype="bfloat16")


@pytest.mark.parametrize("count", [10**9, 10**30])
def test_more_layers_than_could_be_stored_are_refused_at_once(
    llama: Path, tmp_path: Path, count: int
):
    with pytest.raises(BioinitError, match=r"num_layers is 10+"):
        bioinit.convert(llama, tmp_path / "out", set={"num_layers": count})


def test_the_receipt_says_what_became_of_fields_on_both_sides(llama: Path, tmp_path: Path):
    done = bioinit.convert(llama, tmp_path / "out", to="nemo2")
    written = {field["name"]: field for field in done.to_json()["written_fields"]}
    assert written["hidden_size"]["fate"] == "mapped"
    assert {field["name"] for field in done.to_json()["source_fields"]} >= {"hidden_size"}
