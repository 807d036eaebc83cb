"""From words to a record: what Hydra composes, who wrote what, and which words are refused."""

from pathlib import Path

import fiddle as fdl
import pytest
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase
from omegaconf import OmegaConf

from bioinit import recipe
from bioinit.config import Run
from bioinit.errors import ConfigError, StorageError

AWKWARD = [
    "epoch=0-step=9-consumed_samples=20.0-last",
    "with space, comma and {braces}",
    "${oc.env:HOME}/$HOME/${x}",
    r"back\slash 'and' \"quotes\"",
    "~tilde/+plus/[list]/(round)",
    "# no comment",
    "null/true/1e5",
    "ünï/日本",
]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a person's recipe into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "mine.yaml") -> str:
        Path(name).write_text(text)
        return f"./{name}"

    return write


def tree(name, *overrides):
    return recipe.compose_tree(name, overrides).tree


def origin(name, key, *overrides):
    return recipe.compose_tree(name, overrides).origins[key]


@pytest.mark.parametrize("key", ["model.initial_ckpt_path", "output_dir"])
@pytest.mark.parametrize("path", AWKWARD)
def test_a_path_arrives_character_by_character(key, path):
    composed = tree("esm2/masked_lm", f"{key}={path}")
    assert (composed["model"] if "." in key else composed)[key.split(".")[-1]] == path


@pytest.mark.parametrize("path", AWKWARD)
def test_the_printed_recipe_composes_to_itself(own, path):
    first = recipe.compose_tree("esm2/masked_lm", [f"output_dir={path}", "init.seed=3"])
    assert tree(own(first.render())) == first.tree


def test_a_path_may_be_quoted_or_null():
    assert tree("auto/as_saved", "output_dir='a b'")["output_dir"] == "a b"
    assert tree("auto/as_saved", "output_dir=null")["output_dir"] is None
    assert tree("auto/as_saved", "output_dir=")["output_dir"] is None


def test_other_values_are_read_by_hydras_grammar():
    words = ["model.a=1e-5", "model.b=[x,'y z']", "model.c={d: {e: true}}", "model.f=null"]
    model = tree("auto/as_saved", *words)["model"]
    assert model == {"a": 1e-5, "b": ["x", "y z"], "c": {"d": {"e": True}}, "f": None}


def test_a_recipe_may_refer_to_the_path_of_the_command_line(own):
    mine = own("family: auto\noutput_dir: ${model.initial_ckpt_path}/out\nmodel: {}\n")
    assert tree(mine, "model.initial_ckpt_path=a=b")["output_dir"] == "a=b/out"


@pytest.mark.parametrize(
    ("word", "cure"),
    [
        ("+model.num_labels=3", "Write model.num_labels=3"),
        ("++model.num_labels=3", "Write model.num_labels=3"),
        ("~model.num_labels", "model.num_labels=null"),
        ("model.num_labels", "Write for example model.num_labels=1"),
        ("hydra.run.dir=/tmp", "output_dir says where"),
        ("model@x=esm2_8m", "is not a key"),
        ("recipe=esm2/masked_lm", "already 'esm2/masked_lm'"),
        ("model=esm2_9m", "Closest: 'esm2_8m'"),
        ("model.num_labels=2,3", "model.num_labels=[2,3]"),
        ("model.num_labels=range(1,3)", "--multirun"),
        ("model.a=[1", "Quote the value"),
        ("model.a=${nobody}", "nobody"),
    ],
)
def test_a_word_that_cannot_be_meant_is_refused_with_its_cure(word, cure):
    with pytest.raises(ConfigError) as raised:
        recipe.compose_tree("esm2/masked_lm", [word])
    assert cure in str(raised.value)


@pytest.mark.parametrize(
    ("name", "error", "cure"),
    [
        ("esm2/token_clasification", ConfigError, "Closest: 'esm2/token_classification'"),
        ("./absent.yaml", StorageError, "there is no recipe file"),
        ("mine", ConfigError, "recipe=./mine.yaml"),
        ("esm2/masked_lm,bert/masked_lm", ConfigError, "--multirun"),
    ],
)
def test_a_recipe_that_is_not_there_is_named_with_its_cure(own, name, error, cure):
    own("family: auto\n")
    with pytest.raises(error) as raised:
        recipe.compose_tree(name)
    assert cure in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "holds no keys"),
        ("a: 1\na: 2\n", "duplicate key a"),
        ("a: [1\n", "not valid YAML"),
        ("defaults: [/model: esm2_9m]\nfamily: esm2\n", "override /model"),
        ("family: auto\noutput_dir: ${nobody}\n", "nobody"),
        ("family: auto\ndefaults: 3\n", "defaults must be a list"),
        ("family: auto\n1: 2\n", "1 cannot be the name"),
        ("family: auto\ninit: {on: 2}\n", "True cannot be the name"),
        ("family: auto\nhydra: {run: {dir: x}}\n", "no effect"),
        ("a: &x [*x]\n", "refers to itself"),
        ("family: auto\nmodel: !!python/object:os.system x\n", "not valid YAML"),
    ],
)
def test_a_broken_recipe_file_is_one_message(own, text, said):
    with pytest.raises(ConfigError) as raised:
        recipe.compose_tree(own(text))
    assert said in str(raised.value) and "mine.yaml" in str(raised.value)


def test_a_recipe_that_is_no_text_is_one_message(own, tmp_path):
    mine = own("")
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        recipe.compose_tree(mine)


def test_an_own_recipe_builds_on_ours_and_on_presets(own):
    mine = own(
        "defaults:\n  - /recipe/esm2/token_classification\n  - override /model: esm2_8m\n"
        "  - override /init: strict\n  - _self_\nmodel:\n  num_labels: 3\n"
    )
    composed = tree(mine)
    assert composed["family"] == "esm2"
    assert composed["model"]["num_layers"] == 6
    assert composed["model"]["architecture"] == "token_classification"
    assert composed["model"]["num_labels"] == 3
    assert composed["init"]["on_unused"] == "error"


def test_every_key_knows_who_wrote_it(own):
    mine = own(
        "defaults:\n  - override /model: esm2_8m\n  - _self_\nfamily: esm2\nmodel:\n"
        "  hidden_size: 640\n"
    )
    words = ["model.num_labels=3", "model.deep={a: {b: 1}}"]
    found = recipe.compose_tree(mine, words).origins
    said = {key: (found[key].by, found[key].where) for key in found}
    assert said["model.hidden_size"] == ("recipe", "./mine.yaml:6")
    assert said["model.num_layers"] == ("recipe", "./mine.yaml (conf/model/esm2_8m.yaml:2)")
    assert said["model.num_labels"] == ("command line", "model.num_labels=3")
    assert said["model.deep.a.b"] == said["model.deep"] == ("command line", words[1])
    assert "model" not in said and "defaults" not in said


def test_a_preset_is_a_default_until_a_person_chooses_it():
    key = "model.num_layers"
    assert origin("esm2/masked_lm", key).by == "default"
    assert origin("esm2/masked_lm", key, "model=esm2_3b").by == "command line"
    assert tree("esm2/masked_lm", "model=esm2_3b")["model"]["num_layers"] == 36


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_its_preset(own):
    mine = own(
        "defaults:\n  - override /model: esm2_8m\n  - _self_\nfamily: esm2\nmodel:\n"
        "  num_layers: 2\n  hidden_size: 64\n"
    )
    model = tree(mine, "model.hidden_size=32")["model"]
    assert (model["num_layers"], model["hidden_size"], model["ffn_hidden_size"]) == (2, 32, 1280)


def test_one_line_is_one_job():
    [job] = recipe.jobs(["init.seed=1", "recipe=esm2/masked_lm", "output_dir=a,b"])
    assert (job.recipe, job.overrides, job.number) == (
        "esm2/masked_lm",
        ("init.seed=1", "output_dir=a,b"),
        None,
    )


def test_multirun_runs_every_combination_and_never_splits_a_path():
    words = [
        "recipe=esm2/masked_lm,./x.yaml",
        "init.seed=range(0,2)",
        "output_dir=a,b",
        "model.x=[1,2]",
    ]
    found = recipe.jobs(words, multirun=True)
    assert [(job.number, job.recipe, job.overrides[0]) for job in found] == [
        (0, "esm2/masked_lm", "init.seed=0"),
        (1, "esm2/masked_lm", "init.seed=1"),
        (2, "./x.yaml", "init.seed=0"),
        (3, "./x.yaml", "init.seed=1"),
    ]
    assert all(job.overrides[1:] == ("output_dir=a,b", "model.x=[1,2]") for job in found)


@pytest.mark.parametrize("words", [[], ["recipe=a", "recipe=b"], ["init.seed=1"]])
def test_exactly_one_recipe_is_named(words):
    with pytest.raises(ConfigError, match="recipe=NAME"):
        recipe.jobs(words)


def test_a_sweep_that_has_no_end_is_refused():
    with pytest.raises(ConfigError, match="Write the values"):
        recipe.jobs(["recipe=auto/as_saved", "init.seed=interval(0,1)"], multirun=True)


def test_composing_leaves_a_hydra_application_as_it_was(tmp_path):
    with initialize_config_dir(str(tmp_path), version_base="1.2", job_name="theirs"):
        theirs = GlobalHydra.instance().hydra
        assert recipe.compose_tree("auto/as_saved").tree == {"family": "auto"}
        assert GlobalHydra.instance().hydra is theirs
        assert str(VersionBase.instance().getbase()) == "1.2"


def test_composing_leaves_hydra_as_it_was():
    store = ConfigStore.instance()
    store.store(group="recipe", name="somebody_elses", node={"x": 1})
    before = OmegaConf.create({"kept": True})
    recipe.compose_tree("auto/as_saved")
    assert not GlobalHydra().is_initialized()
    assert store.load("recipe/somebody_elses.yaml").node.x == before.kept == 1
    assert "bioinit_run.yaml" not in store.repo


def test_compose_gives_the_record_of_a_run():
    record = recipe.compose("esm2/token_classification", ["model.num_labels=3", "init.seed=7"])
    assert isinstance(record, fdl.Config) and fdl.get_callable(record) is Run
    assert (record.family, record.model.num_labels, record.init.seed) == ("esm2", 3, 7)
    assert record.origins["init.seed"].by == "command line"


@pytest.mark.parametrize(
    ("word", "closest"),
    [
        ("model.num_labls=3", "num_labels"),
        ("init.on_conflct=error", "on_conflict"),
        ("placement.devise=cpu", "device"),
        ("output.overwrit=true", "overwrite"),
        ("outputdir=x", "output_dir"),
    ],
)
def test_an_unknown_name_is_an_error_at_every_level_with_the_closest(word, closest):
    with pytest.raises(ConfigError) as raised:
        recipe.compose("esm2/token_classification", [word])
    assert closest in str(raised.value) and word in str(raised.value)


def test_several_mistakes_are_reported_at_once():
    with pytest.raises(ConfigError) as raised:
        recipe.compose("esm2/masked_lm", ["model.num_layer=3", "init.sed=1"])
    assert "num_layers" in str(raised.value) and "seed" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {num_labels: 3}\n", "names neither a family"),
        ("family: 3\n", "names neither a family"),
        ("family: esm3\n", "esm2"),
        ("family: esm2\nmodel: esm2_8m\n", "not a mapping"),
        ("family: esm2\ninit: 3\n", "init"),
        ("family: esm2\nmodel: {num_layers: many}\n", "./mine.yaml:2"),
        ("family: auto\noutput_dir: [a]\n", "./mine.yaml:2"),
    ],
)
def test_a_recipe_that_is_no_run_is_one_message(own, text, said):
    with pytest.raises(ConfigError) as raised:
        recipe.compose(own(text))
    assert said in str(raised.value)


OWN_CLASS = """
from dataclasses import dataclass
import bioinit

@dataclass(kw_only=True)
class Mine(bioinit.TrainableModelConfig):
    width: int = 4

class NoConfig:
    pass
"""


@pytest.fixture
def own_module(own, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    own(OWN_CLASS, "mine_for_test_recipe.py")
    own("raise RuntimeError('half a module')\n", "broken_for_test_recipe.py")
    return own


def test_a_recipe_may_name_a_persons_own_config_class(own_module):
    text = "model:\n  _target_: mine_for_test_recipe.Mine\n  width: 8\n"
    record = recipe.compose(own_module(text))
    assert record.model.width == 8 and record.origins["model.width"].where == "./mine.yaml:3"
    with pytest.raises(ConfigError, match="Closest: 'width'"):
        recipe.compose(own_module(text + "  widht: 1\n"))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("mine_for_test_recipe.Absent", "has no attribute 'Absent'"),
        ("mine_for_test_recipe.NoConfig", "is no model config"),
        ("absent_module.Mine", "No module named"),
        ("broken_for_test_recipe.Mine", "half a module"),
        ("NoDots", "importing 'NoDots' failed"),
    ],
)
def test_a_target_that_is_no_config_class_is_one_message(own_module, target, said):
    with pytest.raises(ConfigError) as raised:
        recipe.compose(own_module(f"model:\n  _target_: {target}\n"))
    assert said in str(raised.value) and "./mine.yaml:2" in str(raised.value)


def test_aliases_of_aliases_are_refused_before_they_are_written_out(own):
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    name = own("\n".join(["a0: &a0 [1]", *levels]))
    with pytest.raises(ConfigError, match="100000 values"):
        recipe.compose(name, [])


def test_an_alias_that_is_used_a_few_times_is_no_bomb(own):
    name = own("family: auto\nmodel:\n  labels: &l [a, b]\ninit:\n  trainable: *l\n  frozen: *l\n")
    assert recipe.compose(name, []).init.trainable == ("a", "b")
