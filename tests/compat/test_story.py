"""Pretrain, continue, add a head, drop it again: as BioNeMo's users do it, and through recipes."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import bioinit
from bioinit.compat import bionemo
from bioinit.compat.bionemo import config as of_megatron
from bioinit.compat.bionemo import transformer_config
from bioinit.compat.nemo import io
from bioinit.errors import PlanError
from tests.compat import story
from tests.compat.story import Lightning, Trainer, train

STAGES = ("pretrain", "continue", "add_head", "drop_head")

# torch's writer of checkpoints: that there is one process, and that a class of it is deprecated.
pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore::FutureWarning"
)


def save(lightning: Any, folder: Path) -> Path:
    """What NeMo 2's trainer leaves: ``weights/`` with ``module.`` in front, and ``context/``."""
    state = {f"module.{key}": value for key, value in lightning.module.state_dict().items()}
    dcp.save(state, checkpoint_id=folder / "weights", no_dist=True)
    context = io.TrainerContext(model=lightning, trainer=Trainer(max_steps=story.STEPS))
    context.io_dump(folder / "context", yaml_attrs=["model"])
    return folder


def run(config: Any, folder: Path) -> tuple[Path, list[float], Any]:
    """One stage: the checkpoint, the losses, and the config as it is then."""
    lightning = Lightning(config=config)
    lightning.configure_model()
    losses = train(lightning.module, config.get_loss_reduction_class()())
    return save(lightning, folder), losses, lightning


@pytest.fixture(scope="module")
def without_megatron() -> Iterator[ModuleType]:
    """``bioinit.compat.bionemo.config`` as it is where megatron-core is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_config, "find", lambda: transformer_config.StandIn)
        spec = importlib.util.spec_from_file_location("config_alone", of_megatron.__file__)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "config_alone", module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module", params=["with what is installed", "without megatron-core"])
def told(request, tmp_path_factory, without_megatron):
    """The story, stage by stage, with configs over either ``TransformerConfig``."""
    torch.manual_seed(1)
    module = of_megatron if request.param.startswith("with ") else without_megatron
    configs = story.configs(module.MegatronBioNeMoTrainableModelConfig)
    root = tmp_path_factory.mktemp("story")
    stages = {}
    first = configs.Pretrain(hidden_size=24, hidden_dropout=0.0)
    stages["pretrain"] = run(first, root / "pretrain")
    stages["continue"] = run(
        configs.Pretrain(initial_ckpt_path=str(stages["pretrain"][0])), root / "continue"
    )
    stages["add_head"] = run(
        configs.AddHead(
            initial_ckpt_path=str(stages["continue"][0]),
            initial_ckpt_skip_keys_with_these_prefixes=["classifier"],
            hidden_size=8,
        ),
        root / "add_head",
    )
    stages["drop_head"] = run(
        configs.DropHead(initial_ckpt_path=str(stages["add_head"][0])), root / "drop_head"
    )
    return SimpleNamespace(stages=stages, configs=configs)


def losses(told, stage):
    return told.stages[stage][1]


def config(told, stage):
    return told.stages[stage][2].config


@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_falls_in_every_stage(told, stage):
    found = losses(told, stage)
    assert found[-1] < found[0]


def test_each_stage_goes_on_where_the_one_before_it_ended(told):
    before, after = losses(told, "pretrain"), losses(told, "continue")
    assert after[0] < before[0] / 2 and sum(after[:5]) <= sum(before[-5:])
    # A new head has a loss of its own; without the decoder's the rest is less.
    assert losses(told, "add_head")[0] > after[-1]
    assert losses(told, "drop_head")[0] < losses(told, "add_head")[-1] + 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_settings_of_the_first_stage_hold_in_all(told, stage):
    found = config(told, stage)
    assert (found.hidden_size, found.hidden_dropout) == (24, 0.0)
    assert (found.ffn_hidden_size, found.kv_channels) == (96, 24)
    assert found.get_hparam("hidden_size") == 24


def test_what_a_config_keeps_is_its_own(told):
    assert config(told, "add_head").model_cls is story.Both
    assert config(told, "add_head").loss_cls is story.BothLosses
    assert config(told, "drop_head").get_loss_reduction_class() is story.NamingLoss
    path = str(told.stages["pretrain"][0])
    assert config(told, "continue").get_hparam("initial_ckpt_path") == path


def test_the_settings_that_were_taken_over_are_set_from_then_on(told):
    assert set(config(told, "pretrain").get_hparams()) == {"hidden_size", "hidden_dropout"}
    taken = config(told, "continue").get_hparams()
    assert taken["attention_dropout"] == 0.1 and taken["kv_channels"] is None
    assert len(taken) > 50


@pytest.mark.parametrize("stage", STAGES)
def test_the_saved_context_makes_the_same_config_again(told, stage):
    folder, _, lightning = told.stages[stage]
    again = io.load_context(folder / "context", subpath="model.config")
    assert type(again) is type(lightning.config)
    for name in ("hidden_size", "hidden_dropout", "ffn_hidden_size", "model_cls", "loss_cls"):
        assert getattr(again, name) == getattr(lightning.config, name)
    assert again.initial_ckpt_path == lightning.config.initial_ckpt_path


@pytest.mark.parametrize("stage", STAGES)
def test_the_saved_context_is_plain_data_to_everybody_else(told, stage):
    folder, _, lightning = told.stages[stage]
    found = bioinit.load_context(folder, subpath="model.config")
    assert found["hidden_size"] == 24 and found["initial_ckpt_path"] == (
        lightning.config.initial_ckpt_path
    )
    assert json.loads((folder / "context/io.json").read_text())["root"]


def test_what_is_not_skipped_is_what_was_saved(told):
    pretrained, _, _ = told.stages["continue"]
    model = told.configs.AddHead(
        initial_ckpt_path=str(pretrained), initial_ckpt_skip_keys_with_these_prefixes=["classifier"]
    ).configure_model()
    with bioinit.open_checkpoint(pretrained) as stored:
        for key, value in model.state_dict().items():
            if not key.startswith("classifier."):
                assert torch.equal(value, stored.read(f"module.{key}"))


def test_a_new_head_that_nobody_skips_is_an_error_and_nothing_is_loaded(told):
    lacking = told.configs.AddHead(hidden_size=24)
    model = story.Both(lacking)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(PlanError, match=r"classifier\.weight"):
        lacking.update_model_from_checkpoint(model, str(told.stages["continue"][0]))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- settings that are changed before the model is made, as Geneformer's users do it ---


def test_a_smaller_model_is_made_continued_and_given_a_head(told, tmp_path):
    large = told.configs.Pretrain(
        num_layers=6, hidden_size=64, num_attention_heads=4, params_dtype=torch.bfloat16
    )
    small = io.reinit(large)
    for name, value in {"hidden_size": 16, "num_layers": 2, "hidden_dropout": 0.0}.items():
        small.set_hparam(name, value)
    small.set_hparam("activation_func", torch.nn.functional.relu)
    assert (small.kv_channels, large.hidden_size) == (16, 64)
    small = io.reinit(small)
    assert (small.kv_channels, small.ffn_hidden_size, small.num_layers) == (4, 64, 2)

    first, before, _ = run(small, tmp_path / "first")
    again = told.configs.Pretrain(
        initial_ckpt_path=str(first),
        override_parent_fields=[*bionemo.OVERRIDE_BIOBERT_CONFIG_DEFAULTS, "loss_cls"],
    )
    second, after, _ = run(again, tmp_path / "second")
    assert sum(after[:10]) < sum(before[-10:]) * 1.05 and sum(after[-10:]) < sum(after[:10])
    assert (again.num_layers, again.kv_channels) == (2, 4)
    # Both are on BioBERT's list: the dtype of parameters, and the activation.
    assert again.params_dtype is torch.float32
    assert again.activation_func is torch.nn.functional.gelu

    tuned = told.configs.AddHead(
        initial_ckpt_path=str(second), initial_ckpt_skip_keys_with_these_prefixes={"classifier"}
    )
    third, losses, _ = run(tuned, tmp_path / "third")
    assert losses[-1] < losses[0] and tuned.num_layers == 2
    saved = io.load_context(third / "context", subpath="model.config")
    assert saved.initial_ckpt_skip_keys_with_these_prefixes == {"classifier"}
    assert (saved.num_layers, saved.hidden_dropout) == (2, 0.0)


# --- the same through recipes ---


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The story with ``bioinit.compose`` and ``bioinit.initialize``."""
    root = tmp_path_factory.mktemp("ours")
    kinds = {
        "pretrain": ("OurPretrain", story.PaintingLoss, ()),
        "continue": ("OurPretrain", story.PaintingLoss, ()),
        "add_head": ("OurAddHead", story.BothLosses, ("classifier",)),
        "drop_head": ("OurDropHead", story.NamingLoss, ()),
    }
    stages, before = {}, None
    for stage, (kind, loss, skipped) in kinds.items():
        recipe = root / f"{stage}.yaml"
        recipe.write_text(
            f"model:\n  _target_: tests.compat.story.{kind}\n"
            f"  initial_ckpt_skip_keys_with_these_prefixes: {json.dumps(skipped)}\n"
            + ("  hidden_size: 24\n  hidden_dropout: 0.0\n" if before is None else "")
        )
        start = [] if before is None else [f"model.initial_ckpt_path={before}"]
        record = bioinit.compose(str(recipe), start)
        done = bioinit.initialize(record)
        found = train(done.model, loss())
        before = root / stage
        done.save(before)
        stages[stage] = SimpleNamespace(losses=found, done=done, folder=before)
    return stages


def test_through_recipes_the_losses_fall_and_go_on(ours):
    for stage in STAGES:
        assert ours[stage].losses[-1] < ours[stage].losses[0]
    assert ours["continue"].losses[0] < ours["pretrain"].losses[0] / 2
    assert ours["add_head"].losses[0] > ours["continue"].losses[-1]
    assert ours["drop_head"].losses[0] < ours["add_head"].losses[-1] + 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_through_recipes_settings_and_contexts_are_those_of_the_first_stage(ours, stage):
    assert ours[stage].done.config.hidden_size == 24
    found = bioinit.load_context(ours[stage].folder, subpath="model")
    assert (found["hidden_size"], found["hidden_dropout"]) == (24, 0.0)
    origins = {field.field: field.origin.by for field in ours[stage].done.plan.fields}
    assert origins["hidden_size"] == ("recipe" if stage == "pretrain" else "checkpoint")


def test_through_recipes_every_tensor_is_accounted_for(ours):
    claims = {c.key: c.claim for c in ours["add_head"].done.plan.tensors}
    assert claims["classifier.weight"] == "skipped" and claims["paint.weight"] == "loaded"
    unused = {meta.key for meta in ours["drop_head"].done.plan.unused}
    assert unused == {"paint.weight", "paint.bias", "widen.weight", "widen.bias"}


def test_a_checkpoint_of_bionemo_starts_a_recipe_of_ours(told, tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("model:\n  _target_: tests.compat.story.OurAddHead\n")
    folder = told.stages["add_head"][0]
    done = bioinit.initialize(bioinit.compose(str(recipe), [f"model.initial_ckpt_path={folder}"]))
    assert done.config.hidden_size == 24
    assert {claim.claim for claim in done.plan.tensors} == {"loaded"}


def test_a_checkpoint_of_ours_starts_a_config_of_bionemo(told, ours):
    config = told.configs.AddHead(
        initial_ckpt_path=str(ours["continue"].folder),
        initial_ckpt_skip_keys_with_these_prefixes=["classifier"],
    )
    model = config.configure_model()
    assert (config.hidden_size, config.hidden_dropout) == (24, 0.0)
    trained = ours["continue"].done.model.state_dict()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in trained.items())


def test_the_configs_here_are_those_that_people_inherit_from():
    assert issubclass(
        bionemo.MegatronBioNeMoTrainableModelConfig, bionemo.BionemoTrainableModelConfig
    )
