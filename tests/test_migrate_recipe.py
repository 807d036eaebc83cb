"""A run file of BioNeMo as a recipe: it runs, and no key of the file is lost."""

import re
import textwrap

import pytest
import torch
import yaml

import bioinit
from bioinit import cli
from bioinit.errors import ConfigError
from bioinit.families import load
from bioinit.migrate import migrate_recipe
from bioinit.migrate.bionemo import EXPOSED, FIELDS, PRECISIONS, SECTIONS
from bioinit.migrate.page import spelled
from bioinit.migrate.skipped import carried_over

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

# What `bionemo-geneformer-recipe --recipe geneformer_10m_finetune_config` writes, made small.
GENEFORMER = """\
bionemo_model_config:
  activation_func: gelu
  apply_query_key_layer_scaling: false
  apply_residual_connection_post_layernorm: false
  attention_dropout: 0.1
  autocast_dtype: bf16-mixed
  bias_activation_fusion: true
  bias_dropout_fusion: true
  biobert_spec_option: bert_layer_with_transformer_engine_spec
  enable_autocast: false
  ffn_hidden_size: 24
  fp16_lm_cross_entropy: false
  fp32_residual_connection: false
  get_attention_mask_from_fusion: true
  gradient_accumulation_fusion: false
  hidden_dropout: 0.02
  hidden_size: 16
  init_method_std: 0.02
  initial_ckpt_path: null
  initial_ckpt_skip_keys_with_these_prefixes:
  - regression_head
  kv_channels: null
  layernorm_epsilon: 1.0e-12
  layernorm_zero_centered_gamma: false
  make_vocab_size_divisible_by: 128
  masked_softmax_fusion: true
  nemo1_ckpt_path: null
  num_attention_heads: 4
  num_layers: 3
  params_dtype: bf16-mixed
  pipeline_dtype: bf16-mixed
  qk_layernorm: false
  seq_length: 512
  share_embeddings_and_output_weights: true
data_config:
  data_dir: /data/cellxgene
  micro_batch_size: 8
  num_dataset_workers: 0
  result_dir: results
  seq_length: 128
experiment_config:
  create_checkpoint_callback: true
  create_tensorboard_logger: false
  experiment_name: geneformer-10m
  metric_to_monitor_for_checkpoints: reduced_train_loss
  restore_from_checkpoint_path: null
  result_dir: ./results
  save_every_n_steps: 100
  save_last_checkpoint: true
  save_top_k: 2
optim_config:
  lr: 0.001
  lr_scheduler: cosine
  max_steps: null
parallel_config:
  accumulate_grad_batches: 1
  ddp: megatron
  num_devices: 8
  num_nodes: 2
  tensor_model_parallel_size: 1
training_config:
  accelerator: gpu
  limit_val_batches: 8
  max_steps: 400000
  precision: bf16-mixed
  val_check_interval: 100
wandb_config:
  project: geneformer-10m_pretraining
  tags: [geneformer-10m]
"""


@pytest.fixture
def file(tmp_path):
    def write(text: str):
        path = tmp_path / "bionemo.yaml"
        path.write_text(textwrap.dedent(text))
        return path

    return write


@pytest.fixture
def started(file, tmp_path):
    """Migrates a run file; gives its text, its tree and the record."""

    def start(text: str, *words: str):
        made = migrate_recipe(file(text))
        mine = tmp_path / "mine.yaml"
        mine.write_text(made)
        return made, yaml.safe_load(made), bioinit.compose(str(mine), words)

    return start


@pytest.fixture(scope="module")
def esm2(tmp_path_factory):
    """A tiny ESM-2 as NeMo 2 has it."""
    words = ["model={num_layers: 3, hidden_size: 16, num_attention_heads: 2, ffn_hidden_size: 24}"]
    folder = tmp_path_factory.mktemp("nemo2") / "ckpt"
    words += ["output.dialect=nemo2", f"output_dir={folder}"]
    torch.manual_seed(0)
    bioinit.initialize(bioinit.compose("esm2/masked_lm", words))
    return folder


def flat(text: str) -> str:
    """Remarks without the ends of their lines."""
    return re.sub(r"\n *# *", " ", text)


def esm2_run(path, skipped="[]", more="") -> str:
    return f"""
        bionemo_model_config:
          initial_ckpt_path: {path}
          initial_ckpt_skip_keys_with_these_prefixes: {skipped}
          biobert_spec_option: esm2_bert_layer_with_transformer_engine_spec
          {more}
    """


def test_a_run_of_geneformer_becomes_a_recipe_that_builds_its_model(started):
    _, tree, record = started(GENEFORMER)
    assert tree["defaults"][0] == "/recipe/biobert/regression"
    assert tree["model"] == {
        "initial_ckpt_path": None,
        "attention_dropout": 0.1,
        "ffn_hidden_size": 24,
        "hidden_dropout": 0.02,
        "hidden_size": 16,
        "init_method_std": 0.02,
        "layernorm_epsilon": 1e-12,
        "make_vocab_size_divisible_by": 128,
        "num_attention_heads": 4,
        "num_layers": 3,
        "seq_length": 128,  # of the data, as BioNeMo does it
        "activation": "gelu",
        "share_embeddings_and_output_weights": True,
    }
    assert tree["placement"] == {"dtype": "bfloat16"}
    assert tree["output_dir"] == "results/geneformer-10m/start"
    record.output_dir = None
    done = bioinit.initialize(record)
    assert done.model.config.num_hidden_layers == 3
    assert {p.dtype for p in done.model.parameters()} == {torch.bfloat16}


def test_every_key_of_the_file_is_there(started):
    text, tree, _ = started(GENEFORMER)
    source = yaml.safe_load(GENEFORMER)
    for section, fields in source.items():
        for key in fields:
            assert key in text or key in tree["model"], f"{section}.{key}"
    for line in ("# strategy: ddp", "# device: cuda", "8 processes on each of 2 hosts"):
        assert line in text


def test_a_checkpoint_decides_as_it_does_in_bionemo_and_the_plan_says_what_lost(esm2, started):
    text, tree, record = started(esm2_run(esm2, more="num_layers: 6"))
    assert "as the checkpoint's own config says" in text
    assert tree["defaults"][0] == "/recipe/esm2/masked_lm"
    assert tree["init"]["on_conflict"] == "checkpoint"
    plan = bioinit.plan(record)
    assert not plan.problems
    [layers] = [d for d in plan.fields if d.field == "num_layers"]
    assert (layers.value, layers.shadowed[0]) == (3, 6)


def test_a_path_from_here_is_written_so_that_it_holds_from_anywhere(esm2, started, monkeypatch):
    monkeypatch.chdir(esm2.parent)
    _, tree, _ = started(esm2_run(esm2.name))
    assert tree["model"]["initial_ckpt_path"] == str(esm2)


def test_fields_that_are_listed_keep_the_files_value(esm2, started):
    more = "override_parent_fields: [hidden_dropout, params_dtype, skip_logits]\n"
    more += "          hidden_dropout: 0.3"
    text, tree, record = started(esm2_run(esm2, more=more))
    assert tree["model"]["override_parent_fields"] == ["hidden_dropout"]
    assert "params_dtype, skip_logits" in flat(text)
    [dropout] = [d for d in bioinit.plan(record).fields if d.field == "hidden_dropout"]
    assert dropout.value == 0.3


@pytest.mark.parametrize(
    ("skipped", "here"),
    [
        ("lm_head", ["lm_head.dense", "lm_head.layer_norm"]),
        ("encoder.layers.1", ["esm.encoder.layer.1"]),
        ("encoder.final_layernorm", ["esm.encoder.emb_layer_norm_after"]),
        ("embedding", ["esm.embeddings.word_embeddings"]),
    ],
)
def test_skipped_prefixes_are_carried_over_by_what_they_hit(esm2, started, skipped, here):
    _, tree, record = started(esm2_run(esm2, f"[{skipped}]"))
    found = tree["model"]["initial_ckpt_skip_keys_with_these_prefixes"]
    assert found == here
    plan = bioinit.plan(record)
    assert not plan.problems and {"skipped"} <= {claim.claim for claim in plan.tensors}


def test_a_prefix_ends_where_bionemo_lets_it_end():
    family = load("esm2")
    config = family.config(num_layers=12, hidden_size=8, num_attention_heads=2)
    prefixes = ["encoder.layers.1", "encoder.layers.0.self_attention.linear_qkv", "nothing"]
    found = carried_over(
        [*prefixes, "encoder.layers.0.self_attention.linear_qkv.layer"], family, config
    )
    at = "esm.encoder.layer"
    assert found["encoder.layers.1"] == (f"{at}.1", f"{at}.10", f"{at}.11")
    assert found["nothing"] == ()
    assert set(found["encoder.layers.0.self_attention.linear_qkv"]) == {
        f"{at}.0.attention.self",
        f"{at}.0.attention.LayerNorm",  # Transformer Engine keeps it there
    }
    assert found["encoder.layers.0.self_attention.linear_qkv.layer"] == (
        f"{at}.0.attention.LayerNorm",
    )


def test_prefixes_that_hit_nothing_are_remarks(esm2, started):
    text, tree, record = started(esm2_run(esm2, "[digit_classifier]"))
    assert "initial_ckpt_skip_keys_with_these_prefixes" not in tree["model"]
    assert "digit_classifier, which no name of this model has" in flat(text)
    assert not bioinit.plan(record).problems


@pytest.mark.parametrize(
    ("head", "more", "task", "labels"),
    [
        ("regression_head", "", "regression", None),
        ("classification_head", "cnn_num_classes: 5", "token_classification", 5),
        ("classification_head", "mlp_target_size: 4", "sequence_classification", 4),
    ],
)
def test_a_head_that_is_left_out_is_the_task(esm2, started, head, more, task, labels):
    _, tree, record = started(esm2_run(esm2, f"[{head}]", more))
    assert tree["defaults"][0] == f"/recipe/esm2/{task}"
    assert tree["model"].get("num_labels") == labels
    assert tree["model"]["initial_ckpt_skip_keys_with_these_prefixes"] == ["classifier"]
    plan = bioinit.plan(record)
    claims = {claim.key: claim.claim for claim in plan.tensors}
    assert not plan.problems
    assert {claims[key] for key in claims if key.startswith("classifier")} == {"skipped"}


def test_a_frozen_encoder_is_frozen(esm2, started):
    _, tree, record = started(esm2_run(esm2, "[regression_head]", "encoder_frozen: true"))
    assert tree["init"]["frozen"] == ["esm.**"]
    model = bioinit.initialize(record).model
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"classifier"}


def test_an_archive_of_nemo_1_is_where_it_starts(fixtures_dir, started):
    path = fixtures_dir / "nemo1" / "bert_torch_dist.nemo"
    _, tree, record = started(f"bionemo_model_config: {{nemo1_ckpt_path: {path}}}")
    assert tree["model"]["initial_ckpt_path"] == str(path)
    assert tree["defaults"][0] == "/recipe/biobert/masked_lm"
    assert not bioinit.plan(record).problems


def test_checkpoints_of_bionemo_start(fixtures_dir, started):
    path = fixtures_dir / "nemo2" / "esm2_tp2"
    _, tree, record = started(f"bionemo_model_config:\n  initial_ckpt_path: {path}")
    assert tree["defaults"][0] == "/recipe/esm2/masked_lm"
    assert not bioinit.plan(record).problems


@pytest.mark.parametrize(
    ("text", "family", "why"),
    [
        ("bionemo_model_config: {token_dropout: true}", "esm2", "token_dropout"),
        ("bionemo_model_config: {}\ndata_config: {train_database_path: /a}", "esm2", "ESM-2"),
        ("bionemo_model_config: {}\ndata_config: {data_dir: /a}", "biobert", "Geneformer"),
        ("bionemo_model_config: {}", "biobert", "nothing in the file says more"),
        ("bionemo_model_config: {initial_ckpt_path: /nowhere/at/all}", "biobert", "base class"),
        (f"bionemo_model_config: {{initial_ckpt_path: /{'a' * 5000}}}", "biobert", "base class"),
        ("bionemo_model_config: {initial_ckpt_path: ~nobody-at-all/a}", "biobert", "base class"),
    ],
)
def test_the_family_is_concluded_and_the_conclusion_is_said(file, text, family, why):
    made = migrate_recipe(file(text))
    assert f"- /recipe/{family}/masked_lm\n" in made and why in made
    assert "- /recipe/esm2/masked_lm\n" in migrate_recipe(file(text), "esm2")


def test_what_bionemo_assumes_is_written_where_nothing_is_loaded(started):
    _, tree, _ = started("bionemo_model_config: {num_layers: 2}")
    model = tree["model"]
    assert (model["num_layers"], model["hidden_size"]) == (2, EXPOSED["hidden_size"])
    assert (model["layernorm_epsilon"], model["hidden_dropout"]) == (1e-12, 0.02)


@pytest.mark.parametrize(("word", "dtype"), PRECISIONS.items())
def test_each_precision_is_a_dtype(file, word, dtype):
    made = migrate_recipe(file(f"bionemo_model_config: {{params_dtype: {word}}}"))
    assert yaml.safe_load(made)["placement"]["dtype"] == dtype


def test_tensor_parallelism_is_ready_to_be_put_in_force(file):
    text = (
        "bionemo_model_config: {}\nparallel_config: {num_devices: 4, tensor_model_parallel_size: 2}"
    )
    assert "# strategy: fsdp2+tp" in migrate_recipe(file(text))
    assert "# strategy: megatron" in migrate_recipe(file(text.replace("tensor", "pipeline")))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {num_layers: 1}", "has no bionemo_model_config"),
        ("bionemo_model_confg: {}", "no field.*Closest: 'bionemo_model_config'"),
        ("bionemo_model_config: 3", "not a mapping of fields"),
        ("bionemo_model_config:", "not a mapping of fields"),
        ("bionemo_model_config: {num_layer: 3}", "num_layer is no field.*'num_layers'"),
        ("bionemo_model_config: {}\ntrainig_config: {}", "'training_config'"),
        ("bionemo_model_config: {}\ntraining_config: [1]", "training_config is '1' |not a mapping"),
        ("bionemo_model_config: {}\nparallel_config: {num_device: 3}", "'num_devices'"),
        ("bionemo_model_config: {}\nparallel_config: {num_devices: many}", "from 1 on"),
        ("bionemo_model_config: {num_layers: many}", "num_layers"),
        ("bionemo_model_config: {num_layers: -3}", "num_layers is -3"),
        ("bionemo_model_config: {layernorm_epsilon: .inf}", "layernorm_epsilon is inf"),
        ("bionemo_model_config: {initial_ckpt_path: 3}", "not a text"),
        ("bionemo_model_config: {initial_ckpt_path: /a, nemo1_ckpt_path: /b}", "one of them"),
        (
            "bionemo_model_config: {initial_ckpt_skip_keys_with_these_prefixes: head}",
            "not a list of names",
        ),
        ("bionemo_model_config: {initial_ckpt_skip_keys_with_these_prefixes: ['']}", "empty"),
        ("bionemo_model_config: {params_dtype: bf61}", "no precision"),
        ("bionemo_model_config: {encoder_frozen: yes please}", "neither true nor false"),
        (
            "bionemo_model_config: {cnn_num_classes: many, initial_ckpt_skip_keys_with_these_"
            "prefixes: [classification_head]}",
            "num_labels",
        ),
        ("bionemo_model_config: {gated_linear_unit: true, token_dropout: true}", "no gate"),
        ("bionemo_model_config: {activation_func: relu, token_dropout: true}", "gelu"),
        ("bionemo_model_config: {initial_ckpt_path: '???'}", "no path"),
        ('bionemo_model_config: {initial_ckpt_path: "/a\\0b"}', "no path"),
        (
            "bionemo_model_config: {num_layers: 1000000000000, initial_ckpt_skip_keys_with_these_"
            "prefixes: [x]}",
            "num_layers is 1000000000000",
        ),
        ("bionemo_model_config: !!python/object:os.system {}", "asks for an object"),
        ("bionemo_model_config: {num_layers: 1, num_layers: 2}", "twice"),
    ],
)
def test_what_is_wrong_is_said(file, text, said):
    with pytest.raises(ConfigError, match=said):
        migrate_recipe(file(text))


@pytest.mark.parametrize("text", ["\x85- ", "a\n---\nb: c", "\u2028\x85 x", "\t#", "'\r\n\""])
def test_any_text_is_one_line_that_says_the_same(text):
    line = spelled([text])
    assert len(line.splitlines()) == 1 and yaml.safe_load(line) == [text]


def test_nothing_in_the_file_writes_into_the_recipe(started):
    text = """
        bionemo_model_config:
          "x\\nfamily: auto\\nmodel": "y\\n_target_: os.system"
          initial_ckpt_path: "/a ${oc.env:HOME}\\nfamily: auto"
        "z\\noutput_dir": "\\e[2J"
        """
    made, tree, record = started(text)
    assert tree.keys() == {"defaults", "model", "init"} and "\x1b" not in made
    assert record.model.initial_ckpt_path == "/a ${oc.env:HOME}\nfamily: auto"


def test_the_command_prints_the_recipe_or_one_message(file, capsys):
    assert cli.main(["migrate", "recipe", str(file(GENEFORMER))]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["num_layers"] == 3
    assert cli.main(["migrate", "recipe", str(file(GENEFORMER)), "--family", "llama"]) == 2
    assert cli.main(["migrate", "recipe", str(file("a: b"))]) == 2
    assert cli.main(["migrate", "recipe", "/nowhere.yaml"]) == 5
    assert not capsys.readouterr().out


def test_the_tables_name_what_the_file_may_say():
    assert {"data_config", "wandb_config"} <= SECTIONS.keys() and set(EXPOSED) <= FIELDS
