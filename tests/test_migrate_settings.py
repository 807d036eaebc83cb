"""NeMo 1's checkpoint settings: what NeMo 2 and bioinit are told, and what is refused."""

import re
import textwrap

import pytest
import yaml

import bioinit
from bioinit import cli
from bioinit.errors import ConfigError, StorageError
from bioinit.migrate import migrate_settings
from bioinit.migrate.settings import BY_NAME, SETTINGS

# The block of NVIDIA's migration guide.
GUIDE = """\
# Distributed checkpoint setup
dist_ckpt_format: 'zarr' # the old one
dist_ckpt_load_on_device: True
dist_ckpt_parallel_save: False
dist_ckpt_parallel_load: False
dist_ckpt_torch_dist_multiproc: 2
dist_ckpt_assume_constant_structure: False
dist_ckpt_parallel_dist_opt: True
"""

# inspect.signature(MegatronStrategy) of nemo-toolkit 2.2.1.
NEMO_2 = {
    "save_ckpt_format": "torch_dist",
    "ckpt_async_save": True,
    "ckpt_torch_dist_multiproc": None,
    "ckpt_assume_constant_structure": False,
    "ckpt_parallel_save": True,
    "ckpt_parallel_save_within_dp": False,
    "ckpt_parallel_load": True,
    "ckpt_parallel_save_optim": True,
    "ckpt_load_directly_on_device": True,
    "ckpt_load_strictness": None,
    "ckpt_load_optimizer": True,
    "ckpt_save_optimizer": True,
}

# vars(DistributedCheckpointIO.from_config({})) of the same, by our argument.
NEMO_1 = {
    "save_ckpt_format": "torch_dist",
    "ckpt_load_directly_on_device": True,
    "ckpt_load_strictness": None,
    "ckpt_async_save": False,
    "ckpt_torch_dist_multiproc": None,
    "ckpt_parallel_save": False,
    "ckpt_parallel_save_within_dp": False,
    "ckpt_parallel_load": False,
}

NAMES = {
    "dist_ckpt_format": ("save_ckpt_format", "zarr"),
    "dist_ckpt_load_on_device": ("ckpt_load_directly_on_device", False),
    "dist_ckpt_parallel_save": ("ckpt_parallel_save", True),
    "dist_ckpt_parallel_save_within_dp": ("ckpt_parallel_save_within_dp", True),
    "dist_ckpt_parallel_load": ("ckpt_parallel_load", True),
    "dist_ckpt_torch_dist_multiproc": ("ckpt_torch_dist_multiproc", 4),
    "dist_ckpt_assume_constant_structure": ("ckpt_assume_constant_structure", True),
    "dist_ckpt_parallel_dist_opt": ("ckpt_parallel_save_optim", False),
    "dist_ckpt_load_strictness": ("ckpt_load_strictness", "raise_all"),
    "ckpt_parallel_load": ("ckpt_parallel_load", False),
}


@pytest.fixture
def migrated(tmp_path):
    def migrate(text: str):
        file = tmp_path / "nemo1.yaml"
        file.write_text(textwrap.dedent(text))
        return migrate_settings(file)

    return migrate


def in_yaml(text: str) -> dict:
    return yaml.safe_load(text)


def test_the_defaults_are_those_of_both_nemos():
    assert {s.new: s.default for s in SETTINGS if s.new in NEMO_2} == NEMO_2
    assert {s.new: s.before for s in SETTINGS if s.new in NEMO_1} == NEMO_1


@pytest.mark.parametrize(("old", "expected"), NAMES.items())
def test_each_name_becomes_its_argument(migrated, old, expected):
    name, value = expected
    found = migrated(f"model:\n  {old}: {value}\n")
    assert found.strategy[name] == value
    assert in_yaml(found.text)[name] == value


def test_the_guides_block_becomes_arguments_and_says_why_in_every_line(migrated):
    found = migrated(GUIDE)
    assert found.strategy == {
        "save_ckpt_format": "zarr",
        "ckpt_load_directly_on_device": True,
        "ckpt_parallel_save": False,
        "ckpt_parallel_load": False,
        "ckpt_torch_dist_multiproc": 2,
        "ckpt_assume_constant_structure": False,
        "ckpt_parallel_save_optim": True,
        "ckpt_async_save": False,  # NeMo 2 would save zarr asynchronously, and refuses to
    }
    for name in found.strategy:
        [line] = [x for x in found.text.splitlines() if x.startswith(f"{name}: ")]
        assert re.search(r"# default \S+; .+; (renamed from dist_ckpt_|not in the file)", line)
    assert "ckpt_load_on_device, as NVIDIA's guide has it, never existed" in found.text


def test_our_sections_do_the_same(migrated):
    found = migrated(GUIDE)
    assert found.recipe == {
        "placement": {"device": "cuda", "parallel_load": "off"},
        "output": {"dialect": "nemo2", "format": "torch_dist"},
    }
    assert {k: in_yaml(found.text)[k] for k in found.recipe} == found.recipe
    for name in ("ckpt_parallel_save", "torch_dist_multiproc", "assume_constant", "save_optim"):
        assert re.search(rf"^# - \w*{name}\w*: ", found.text, re.MULTILINE), name
    assert "which bioinit reads and does not write" in found.text


@pytest.mark.parametrize(
    ("word", "missing", "unused"),
    [
        ("assume_ok_unexpected", "error", "report"),
        ("log_all", "init", "report"),
        ("raise_unexpected", "error", "report"),
        ("raise_all", "error", "error"),
        ("ignore_all", "init", "report"),
    ],
)
def test_strictness_becomes_two_policies(migrated, word, missing, unused):
    found = migrated(f"dist_ckpt_load_strictness: {word}")
    assert found.recipe["init"] == {"on_missing": missing, "on_unused": unused}


def test_our_sections_are_a_recipe(migrated, tmp_path):
    found = migrated(GUIDE + "dist_ckpt_load_strictness: log_all\n")
    ours = found.text[found.text.index("placement:") :]
    mine = tmp_path / "mine.yaml"
    mine.write_text("defaults: [/recipe/esm2/masked_lm, _self_]\n" + ours)
    run = bioinit.compose(str(mine))
    assert (run.placement.device, run.placement.parallel_load) == ("cuda", "off")
    assert (run.output.dialect, run.output.format) == ("nemo2", "torch_dist")
    assert (run.init.on_missing, run.init.on_unused) == ("init", "report")
    model = "model={num_layers: 1, hidden_size: 8, num_attention_heads: 2}"
    plan = bioinit.plan(bioinit.compose(str(mine), [model, "placement.device=cpu"]))
    assert not plan.problems


def test_a_whole_run_is_searched_and_what_it_leaves_out_is_as_nemo_1_took_it(migrated):
    found = migrated("""
        trainer: {accelerator: cpu, precision: bf16}
        exp_manager:
          checkpoint_callback_params:
            async_save: true
            filename: 'megatron--{val_loss:.2f}-{step}'
        model:
          max_position_embeddings: ${.encoder_seq_length}
          data:
            data_prefix: ???
          dist-ckpt-load-on-device: true
        """)
    assert found.strategy == {
        "ckpt_load_directly_on_device": True,
        "ckpt_parallel_save": False,
        "ckpt_parallel_load": False,
        "ckpt_async_save": True,
    }
    assert "moved here from exp_manager" in found.text
    assert "not in the file, where NeMo 1 took false" in found.text
    assert found.recipe["placement"]["device"] == "cpu"


def test_names_that_never_were_or_are_gone(migrated):
    found = migrated("ckpt_load_on_device: false\nckpt_include_optimizer: true\n")
    assert found.strategy == {
        "ckpt_load_directly_on_device": False,
        "ckpt_load_optimizer": True,
        "ckpt_save_optimizer": True,
    }
    assert "ckpt_load_on_device, which never existed" in found.text
    assert "ckpt_include_optimizer is dropped" in found.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dist_ckpt_paralel_load: true", "'dist_ckpt_parallel_load'"),
        ("model: {dist_ckpt_frmat: zarr}", r"model.dist_ckpt_frmat .*'dist_ckpt_format'"),
        ("ckpt_paralel_save: true", "'ckpt_parallel_save'"),
        ("dist_ckpt_parallel_load: maybe", "'maybe', and would have to be true or false"),
        ("dist_ckpt_parallel_load: 1", "would have to be true or false"),
        ("dist_ckpt_load_on_device:", "'null', and would have to be true or false"),
        ("dist_ckpt_format: torchdist", "Closest: 'torch_dist'"),
        ("dist_ckpt_format: ${oc.env:FORMAT}", "interpolation"),
        ("dist_ckpt_torch_dist_multiproc: 0", "from 1 on"),
        ("dist_ckpt_load_on_device: {zarr: true}", "a mapping of 1', and would have to be true"),
        ("dist_ckpt_torch_dist_multiproc: true", "from 1 on"),
        ("dist_ckpt_load_strictness: raise", "raise_unexpected"),
        ("dist_ckpt_load_strictness: [raise_all]", "raise_unexpected"),
        ("dist_ckpt_format: [zarr]", "would have to be one of"),
        ("dist_ckpt_format: zarr\nmodel: {dist_ckpt_format: torch_dist}", "both mean"),
        ("dist_ckpt_format: zarr\ndist_ckpt_format: zarr", "stands twice"),
        ("dist_ckpt_format: zarr\nasync_save: true", "only torch_dist"),
        ("ckpt_load_main_params: true", "ckpt_load_optimizer"),
        ("hidden_size: 12", "says nothing of checkpoints"),
        ("- 1", "holds a list"),
        ("", "holds nothing"),
        ("a: [1", "not usable YAML"),
        ("a: !!python/object/apply:os.system [echo]", "asks for an object"),
        ("a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\n" + "".join(
            f"k{i}: &k{i} [{'*c,' * 9}]\n" if i == 0 else f"k{i}: &k{i} [{f'*k{i - 1},' * 9}]\n"
            for i in range(8)), "aliases unfold"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(migrated, text, said):
    with pytest.raises(ConfigError, match=said):
        migrated(text)


def test_every_argument_has_an_old_name_or_says_that_it_is_new():
    assert set(BY_NAME) >= set(NEMO_2)


@pytest.mark.parametrize(
    ("text", "code"), [(GUIDE, 0), ("dist_ckpt_x: 1", 2), (b"\xff\xfe\x00", 2), (None, 5)]
)
def test_the_command_prints_yaml_or_one_message(tmp_path, capsys, text, code):
    file = tmp_path / "nemo1.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert cli.main(["migrate", "settings", str(file)]) == code
    out, err = capsys.readouterr()
    if code:
        assert not out and err.startswith("bioinit: ") and str(file) in err
    else:
        assert in_yaml(out)["save_ckpt_format"] == "zarr" and not err


def test_a_folder_is_no_file_of_settings(tmp_path):
    with pytest.raises(StorageError, match="a folder"):
        migrate_settings(tmp_path)
