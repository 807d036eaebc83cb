"""Every recipe and every preset in the repository: the folders are the lists."""

import dataclasses
from pathlib import Path

import fiddle as fdl
import pytest
import torch
import transformers

import bioinit
from bioinit import families, recipe
from bioinit.config import InitPolicy, Output, Placement
from bioinit.keys import Pattern, SkipPrefix
from bioinit.recipe import sources
from tests.checkpoints import MODELS, SMALL, write

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "recipes").rglob("*.yaml"))
PRESETS = sorted((ROOT / "conf").rglob("*.yaml"))
TASKS = (
    "masked_lm causal_lm sequence_classification token_classification regression as_saved".split()
)
WITHOUT = {"masked_lm": ("llama", "mixtral", "gpt_neox"), "causal_lm": ("esm2",)}
NAMED = {  # of which other tests have no tiny model
    "mistral": transformers.MistralConfig(**SMALL, num_key_value_heads=2),
    "gemma": transformers.GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=16),
    "gemma2": transformers.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=16),
    "nemotron": transformers.NemotronConfig(**SMALL, num_key_value_heads=2),
    "biobert": transformers.MegatronBertConfig(**SMALL),
}
OF_PRESET = {"geneformer": "bert", "biobert": "bert"}  # others begin with their family's name
PREFIXES = "initial_ckpt_skip_keys_with_these_prefixes"
each_recipe = pytest.mark.parametrize("name", sources.names())
each_preset = pytest.mark.parametrize("path", PRESETS, ids=lambda p: f"{p.parent.name}/{p.stem}")


def test_the_folder_is_the_list():
    assert len(sources.names()) == len(FILES) > 0
    assert {group for group in sources.GROUPS if sources.options(group)} == set(sources.GROUPS)


@each_recipe
def test_a_recipe_composes_into_a_record(name):
    record = recipe.compose(name)
    assert record.family == name.split("/")[0]


@each_recipe
def test_a_recipe_is_named_after_its_family_and_task(name):
    family, task = name.split("/")
    assert family in families.names() and task in TASKS


@each_recipe
def test_a_recipe_says_in_one_line_what_it_is_for(name):
    assert 20 < len(sources.summary(sources.find(name))) < 100


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One tiny model of every kind, as transformers writes it."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in MODELS:
        write(root / name, name)
    for name in {*NAMED} & {*families.names()}:
        torch.manual_seed(0)
        kind = "MaskedLM" if name == "biobert" else "CausalLM"
        model = getattr(transformers, f"AutoModelFor{kind}").from_config(NAMED[name])
        model.save_pretrained(root / name / "safetensors")
    return {name: root / name / "safetensors" for name in (*MODELS, *NAMED)}


def fitting():
    """Every recipe with every tiny checkpoint that it is for."""
    for name in sources.names():
        family, task = name.split("/")
        for model in MODELS if family == "auto" else (family,):
            if model in WITHOUT.get(task, ()):
                continue
            yield name, model


@pytest.mark.parametrize(("name", "model"), list(fitting()))
def test_a_recipe_starts_a_fitting_checkpoint_and_each_of_its_names_is_one(
    checkpoints, name, model
):
    words = [f"model.initial_ckpt_path={checkpoints[model]}"]
    if name.endswith("_classification"):
        words.append("model.num_labels=3")
    record = recipe.compose(name, words)
    planned = bioinit.plan(record)
    assert not planned.problems
    keys = [claim.key for claim in planned.tensors]
    for prefix in recipe.compose_tree(name, words).tree["model"].get(PREFIXES, ()):
        assert any(SkipPrefix(prefix).matches(key) for key in keys), prefix
    if record.family != "auto":  # whose patterns are for heads of many architectures
        for pattern in record.init.new:
            assert any(Pattern(pattern).match(key) is not None for key in keys), pattern


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in sources.names()
        if n.endswith(("_classification", "regression")) and "auto" not in n
    ],
)
def test_a_new_head_is_already_on_the_skip_list(name):
    [prefix] = recipe.compose(name).model.initial_ckpt_skip_keys_with_these_prefixes
    assert prefix in ("classifier", "score")


@each_preset
def test_a_preset_says_in_its_first_line_what_it_is(path):
    assert path.read_text().startswith("# ")


@each_preset
def test_a_preset_writes_fields_that_exist(path):
    written = {name.partition(".")[0] for name in sources.parse(path, path.name).lines}
    classes = {"init": InitPolicy, "placement": Placement, "output": Output}
    if path.parent.name == "model":
        start = path.stem.partition("_")[0]
        fitting = (name for name in families.names() if path.stem.startswith(name))
        family = OF_PRESET.get(start) or max(fitting, key=len)
        own = next(name for name in sources.names() if name.startswith(f"{family}/"))
        record = recipe.compose(own, [f"model={path.stem}"])
        assert written <= {f.name for f in dataclasses.fields(fdl.get_callable(record.model))}
        fdl.build(record.model)
    else:
        assert written <= {f.name for f in dataclasses.fields(classes[path.parent.name])}
        record = recipe.compose("auto/as_saved", [f"{path.parent.name}={path.stem}"])
        fdl.build(getattr(record, path.parent.name))
