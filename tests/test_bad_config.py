"""What a hostile or a broken config.json gets: one message that says why, and an exit code."""

import json
import os
import re
from dataclasses import dataclass

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

import bioinit  # noqa: E402
from bioinit.config import Run, TrainableModelConfig  # noqa: E402
from bioinit.errors import BioinitError  # noqa: E402
from bioinit.record import make_record  # noqa: E402
from tests.checkpoints import MODELS  # noqa: E402


@pytest.fixture
def esm(tmp_path):
    cls, config = MODELS["esm2"]
    cls(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "code", "says"),
    [
        ({"intermediate_size": -1}, 2, "negative dimension -1"),
        ({"hidden_size": 10**18}, 2, "overflowed"),
        ({"hidden_size": 10**30}, 2, "Overflow"),
        ({"pad_token_id": 1000}, 2, "Padding_idx"),
        ({"x": "[" * 900}, 4, "nested deeper"),
        ({"num_hidden_layers": 10**9}, 4, "num_hidden_layers is 1000000000"),
        ({"inner": [{"num_local_experts": 10**9}]}, 4, "inner.0.num_local_experts is 1000000000"),
        ({"num_labels": 10**9}, 4, "no head has more than 1000000 labels"),
        ({"architectures": ["EsmPreTrainedModel"]}, 2, "EsmPreTrainedModel"),
        ({"architectures": {"a": 1}}, 4, "architectures is"),
        ({"id2label": "x"}, 4, "id2label is 'x'"),
        ({"model_type": None}, 2, "names no model_type"),
        ({"a": [{"b": {"quantization_config": {"x": 1}}}]}, 4, "a.0.b.quantization_config"),
        ({"t": {"u": {"auto_map": {"A": "x.y"}}}}, 4, "t.u.auto_map"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_describes_no_model_is_refused_and_says_why(esm, changed, code, says):
    with pytest.raises(BioinitError, match=re.escape(says)) as caught:
        bioinit.plan(as_saved(esm, changed))
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"to_dict": 3, "configure_model": 4, "hf_fields": 5, "attribute_map": {}},
        {"": 1, "a b": 2, "class": 3, "a.b": 4, "__dict__": 5, "self": 6},
        {"architectures": "EsmForMaskedLM"},
    ],
)
def test_a_key_that_no_field_can_have_is_left_out(esm, changed):
    planned = bioinit.plan(as_saved(esm, changed))
    assert planned.targets and not planned.problems


def as_saved(folder, changed):
    file = folder / "config.json"
    text = json.dumps({**json.loads(file.read_text()), **changed})
    file.write_text(text.replace('"' + "[" * 900 + '"', "[" * 900 + "]" * 900))
    return bioinit.compose("auto/as_saved", [f"model.initial_ckpt_path={folder}"])


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_a_config_that_is_no_file_is_there_and_cannot_be_read(esm, kind):
    (esm / "config.json").unlink()
    (esm / "config.json").mkdir() if kind == "folder" else os.mkfifo(esm / "config.json")
    with pytest.raises(BioinitError, match="is there and cannot be read"):
        bioinit.load_context(esm)


@dataclass(kw_only=True)
class Nothing(TrainableModelConfig):
    def configure_model(self):
        return torch.nn.Module()


def test_a_model_that_has_no_tensor_at_all_is_a_problem(esm):
    planned = bioinit.plan(make_record(Run, {"model": Nothing(initial_ckpt_path=str(esm))}))
    assert "nothing can be loaded" in str(planned.problems[0])
