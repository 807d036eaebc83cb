"""A saved config as a recipe: it starts the same model, and every field and class is named."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

import bioinit
from bioinit import cli
from bioinit.config import Run
from bioinit.errors import ConfigError, CorruptCheckpoint, StorageError, UnknownFormat
from bioinit.migrate import migrate_context
from bioinit.record import make_record

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

SMALL = {
    "vocab_size": 33,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "position_embedding_type": "rotary",
    "pad_token_id": 1,
    "mask_token_id": 32,
    "token_dropout": True,
}
FIXTURES = {
    "nemo2/esm2_tp2": "esm2/masked_lm",
    "nemo2/llama_tp1": "llama/causal_lm",
    "nemo1/bert_torch_dist.nemo": "biobert/masked_lm",
    "hf/gpt_neox/safetensors": "gpt_neox/causal_lm",
    "hf/mixtral/sharded": "mixtral/causal_lm",
}


@pytest.fixture(scope="module")
def esm2(tmp_path_factory) -> Path:
    """A tiny ESM-2 as transformers writes it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("esm2")
    transformers.EsmForMaskedLM(transformers.EsmConfig(**SMALL)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def nemo2(esm2, tmp_path_factory) -> Path:
    """The same as NeMo 2 has it."""
    folder = tmp_path_factory.mktemp("nemo2") / "ckpt"
    record = bioinit.compose(
        "esm2/masked_lm",
        [f"model.initial_ckpt_path={esm2}", "output.dialect=nemo2", f"output_dir={folder}"],
    )
    bioinit.initialize(record)
    return folder


@pytest.fixture
def started(tmp_path):
    """Runs the recipe of a checkpoint; gives it, and the plan."""

    def start(path: Path, *words: str):
        mine = tmp_path / "mine.yaml"
        mine.write_text(migrate_context(path))
        return yaml.safe_load(mine.read_text()), bioinit.plan(bioinit.compose(str(mine), words))

    return start


def values(plan) -> dict:
    return {decision.field: decision.value for decision in plan.fields}


def renamed(source: Path, target: Path, *changes: tuple[str, str]) -> Path:
    """A copy of a checkpoint whose ``io.json`` says other words; weights are linked."""
    (target / "context").mkdir(parents=True)
    (target / "weights").symlink_to(source / "weights")
    text = (source / "context" / "io.json").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (target / "context" / "io.json").write_text(text)
    return target


@pytest.mark.parametrize(("name", "base"), FIXTURES.items())
def test_checkpoints_of_the_original_software_start_the_same_model(
    fixtures_dir, started, name, base
):
    recipe, plan = started(fixtures_dir / name)
    assert recipe["defaults"] == [f"/recipe/{base}", {"override /model": None}, "_self_"]
    assert not plan.problems
    assert {claim.claim for claim in plan.tensors} <= {"loaded", "tied", "initialized"}
    said = bioinit.plan(bioinit.compose(base, [f"model.initial_ckpt_path={fixtures_dir / name}"]))
    assert values(plan) == values(said)


def test_a_context_that_is_no_whole_model_says_what_is_to_be_filled_in(fixtures_dir, started):
    path = fixtures_dir / "gpt_neox"
    with pytest.raises(ConfigError, match="hidden_size"):
        started(path)
    _, plan = started(path, "model.hidden_size=64", "model.num_attention_heads=4")
    assert not plan.problems


def test_what_the_checkpoint_says_is_a_remark_and_not_repeated(esm2, started):
    recipe, plan = started(esm2)
    text = migrate_context(esm2)
    assert recipe["model"] == {"initial_ckpt_path": str(esm2)}
    assert "  # num_layers: 2  # config.json: num_hidden_layers" in text
    assert "architectures" in text and values(plan)["num_layers"] == 2


def test_a_remark_without_its_mark_is_in_force(esm2, tmp_path):
    text = migrate_context(esm2).replace("# hidden_dropout: 0.1", "hidden_dropout: 0.3")
    text = text.replace("model:\n", "model:\n  override_parent_fields: [hidden_dropout]\n", 1)
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    plan = bioinit.plan(bioinit.compose(str(mine)))
    assert values(plan)["hidden_dropout"] == 0.3 and not plan.problems


def test_a_head_of_transformers_is_taken_as_it_was_saved(tmp_path, started):
    config = transformers.EsmConfig(**SMALL, num_labels=3)
    transformers.EsmForTokenClassification(config).save_pretrained(tmp_path / "ckpt")
    recipe, plan = started(tmp_path / "ckpt")
    assert recipe["defaults"][0] == "/recipe/auto/as_saved"
    assert "EsmForTokenClassification" in migrate_context(tmp_path / "ckpt")
    assert {c.key: c.claim for c in plan.tensors}["classifier.weight"] == "loaded"


def test_our_own_context_brings_its_head_along(esm2, tmp_path, started):
    words = [f"model.initial_ckpt_path={esm2}", "model.labels=[a,b,c]"]
    record = bioinit.compose("esm2/token_classification", words)
    bioinit.initialize(record).save(tmp_path / "ckpt")
    recipe, plan = started(tmp_path / "ckpt")
    assert recipe["defaults"][0] == "/recipe/esm2/token_classification"
    assert recipe["model"]["labels"] == ["a", "b", "c"]
    assert recipe["model"]["initial_ckpt_skip_keys_with_these_prefixes"] == []
    assert {c.claim for c in plan.tensors} == {"loaded"} and not plan.problems


def test_classes_are_named_with_what_takes_their_place_and_none_is_imported(nemo2):
    before = set(sys.modules)
    text = migrate_context(nemo2)
    for name in ("bionemo.llm.lightning.BionemoLightningModule", "BioNeMoESMTokenizer"):
        assert name in text
    assert "bionemo.esm2.model.model.ESM2Config" in text
    assert not [m for m in set(sys.modules) - before if m.split(".")[0] in ("bionemo", "nemo")]


def test_the_context_folder_means_its_checkpoint(nemo2, started):
    recipe, plan = started(nemo2 / "context")
    assert recipe["model"]["initial_ckpt_path"] == str(nemo2) and not plan.problems


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        (("model.finetune.sequence_model", "ESM2FineTuneSeqConfig"), "regression"),
        (("model.finetune.token_model", "ESM2FineTuneTokenConfig"), "token_classification"),
    ],
)
def test_a_fine_tuned_model_of_bionemo_gets_a_new_head(nemo2, tmp_path, started, kind, task):
    module, name = kind
    changes = (("esm2.model.model", f"esm2.{module}"), ("ESM2Config", name))
    recipe, plan = started(renamed(nemo2, tmp_path / "ckpt", *changes))
    assert recipe["defaults"][0] == f"/recipe/esm2/{task}"
    assert name in migrate_context(tmp_path / "ckpt") and not plan.problems


def test_an_unknown_class_is_named_with_a_way_on(nemo2, tmp_path):
    changes = (("bionemo.esm2.model.model", "their.models"), ("ESM2Config", "MyEsm2Config"))
    path = renamed(nemo2, tmp_path / "ckpt", *changes)
    with pytest.raises(ConfigError, match=r"their\.models\.MyEsm2Config.*load_weights"):
        migrate_context(path)
    assert "their" not in sys.modules


@dataclass(kw_only=True)
class Mine(bioinit.TrainableModelConfig):
    width: int = 4

    def configure_model(self) -> torch.nn.Module:
        return torch.nn.Linear(self.width, self.width)


def test_a_config_of_ones_own_is_named_and_not_imported(tmp_path):
    run = make_record(Run, {"model": make_record(Mine, {"width": 3}, {}, at="model")}, {})
    bioinit.initialize(run).save(tmp_path / "own")
    with pytest.raises(ConfigError, match=r"_target_: \S*test_migrate_context\.Mine"):
        migrate_context(tmp_path / "own")


def test_weights_without_a_config_are_no_context(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnknownFormat, match="no saved config"):
        migrate_context(tmp_path)
    with pytest.raises(StorageError):
        migrate_context(tmp_path / "nowhere")


def test_nothing_in_a_saved_config_writes_into_the_recipe(esm2, tmp_path):
    folder = tmp_path / "a ${oc.env:HOME} #b"
    folder.mkdir()
    config = json.loads((esm2 / "config.json").read_text())
    config["x\nmodel:\n  _target_: os.system"] = "y\nfamily: auto\n\x1b[2J"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").symlink_to(esm2 / "model.safetensors")
    text = migrate_context(folder)
    assert yaml.safe_load(text).keys() == {"defaults", "model"}
    assert "_target_" not in yaml.safe_load(text)["model"] and "\x1b" not in text
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    assert bioinit.compose(str(mine)).model.initial_ckpt_path == str(folder)


def test_counts_beyond_all_measure_are_refused_before_they_are_used(esm2, tmp_path):
    config = json.loads((esm2 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    (tmp_path / "model.safetensors").symlink_to(esm2 / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match="num_hidden_layers"):
        migrate_context(tmp_path)


def test_the_command_prints_the_recipe_or_one_message(esm2, tmp_path, capsys):
    assert cli.main(["migrate", "context", str(esm2)]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["initial_ckpt_path"] == str(esm2)
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    assert cli.main(["migrate", "context", str(tmp_path)]) == 4
    assert cli.main(["migrate", "context", str(esm2), "--family", "esm2"]) == 2
    assert cli.main(["migrate", "context", str(tmp_path / "no")]) == 5
    assert not capsys.readouterr().out
