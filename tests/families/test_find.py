"""Whose checkpoint it is, asked of all families together."""

import pytest
import torch
from safetensors.torch import save_file

import bioinit
from bioinit import families


@pytest.mark.parametrize("model", ["bert", "esm2", "gpt_neox", "llama", "mixtral"])
def test_an_open_checkpoint_says_whose_spelling_its_names_are(fixtures_dir, model):
    with bioinit.open_checkpoint(fixtures_dir / "hf" / model / "safetensors") as checkpoint:
        assert checkpoint.dialect == "hf"


def test_names_of_nobody_have_no_dialect(tmp_path):
    save_file({"a.b": torch.zeros(2)}, tmp_path / "model.safetensors")
    with bioinit.open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.dialect is None


def test_names_alone_are_enough_where_they_fit_one_family(fixtures_dir):
    file = fixtures_dir / "hf" / "bert" / "safetensors" / "model.safetensors"
    with bioinit.open_checkpoint(file) as checkpoint:
        assert families.find(None, checkpoint.tensors) == "bert" and checkpoint.dialect == "hf"
