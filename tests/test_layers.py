"""``init.layers``: layer i of the model is layer ``layers[i]`` of the checkpoint, no other read."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import bioinit
from bioinit.errors import ConfigError, PlanError
from bioinit.plan import SKIP_LIST
from tests import checkpoints

LAYER = re.compile(r"((?:^|\.)layers?\.)(\d+)\.")
CASES = ("llama", "bert", "esm2", "mixtral")
CONTACTS = "esm.contact_head"  # has a weight per layer and head


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    for name in CASES:
        (folder / name).mkdir()
        checkpoints.write(folder / name, name)
    return folder


def started(path, *overrides):
    record = bioinit.compose("auto/as_saved", [f"model.initial_ckpt_path={path}", *overrides])
    return bioinit.initialize(record)


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layers", ["[1]", "[1,0]", "[1,1,0]", "1"])
def test_each_layer_has_the_bytes_of_the_one_that_was_asked_for(written, name, layout, layers):
    path = written / name / layout
    whole = started(path).model.state_dict()
    skipped = [f"{SKIP_LIST}=[{CONTACTS}]"] if name == "esm2" else []
    done = started(path, f"init.layers={layers}", *skipped)
    chosen = [0] if layers == "1" else [int(digit) for digit in layers if digit.isdigit()]
    state = done.model.state_dict()
    assert {int(m[2]) for key in state if (m := LAYER.search(key))} == set(range(len(chosen)))
    for key, tensor in state.items():
        if key.startswith(CONTACTS):
            continue
        source = LAYER.sub(lambda m: f"{m[1]}{chosen[int(m[2])]}.", key, count=1)
        assert torch.equal(tensor, whole[source]), key
    assert not done.plan.unused


def test_the_files_of_other_layers_are_not_touched(written, tmp_path):
    path = written / "llama" / "sharded"
    plan = bioinit.plan(
        bioinit.compose("auto/as_saved", [f"model.initial_ckpt_path={path}", "init.layers=[1]"])
    )
    whole = load_file(written / "llama" / "safetensors" / "model.safetensors")
    wanted = sum(tensor.nbytes for name, tensor in whole.items() if ".layers.0." not in name)
    assert plan.bytes_to_read == wanted
    untouched = [n for n, _ in enumerate(plan.files) if not plan.bytes_by_file.get(n)]
    assert untouched, "the small shards hold some layer alone"
    assert any("are left out" in note for note in plan.notes)


def test_the_count_of_layers_is_that_of_the_choice(written):
    done = started(written / "bert" / "safetensors", "init.layers=[1]")
    assert done.model.config.num_hidden_layers == 1
    decision = next(d for d in done.plan.fields if d.field == "num_hidden_layers")
    assert decision.value == 1 and "init.layers" in decision.origin.where


def test_another_count_in_the_recipe_conflicts(written):
    with pytest.raises(PlanError, match="num_hidden_layers"):
        started(written / "bert" / "safetensors", "init.layers=[1]", "model.num_hidden_layers=2")


@pytest.mark.parametrize("layers", ["[2]", "[-1]", "3", "0", "[]"])
def test_layers_that_the_checkpoint_does_not_have_are_refused(written, layers):
    with pytest.raises(ConfigError, match=r"init\.layers=.*2 layers"):
        started(written / "bert" / "safetensors", f"init.layers={layers}")


def test_without_a_saved_config_nobody_knows_how_many_there_are(tmp_path):
    save_file({"esm.encoder.layer.0.x": torch.ones(2)}, tmp_path / "model.safetensors")
    record = bioinit.compose(
        "esm2/masked_lm", [f"model.initial_ckpt_path={tmp_path}", "init.layers=1"]
    )
    with pytest.raises(ConfigError, match="no saved config"):
        bioinit.plan(record)
