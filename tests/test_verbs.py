"""Fill, drop and affine: what a load does that is no copy."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bioinit.config import InitPolicy
from bioinit.errors import PlanError
from bioinit.families import open_checkpoint
from bioinit.mapping import Mapping, Names
from bioinit.plan import Model, plan
from bioinit.rules import Narrow, Part, Rule, dropped
from bioinit.targets import describe

WORDS = torch.arange(1.0, 25.0).reshape(6, 4)


class Padded(nn.Module):
    def __init__(self, rows=8, dtype=torch.float32):
        super().__init__()
        self.words = nn.Parameter(torch.full((rows, 4), 7.0, dtype=dtype))
        self.norm = nn.Parameter(torch.full((4,), 7.0, dtype=dtype))


def table(rows, add=0.0, fill=True):
    vocab = Rule("words", (Part("w", (Narrow(0, 0, 6, rows),)),), fill=fill)
    return Mapping([vocab, Rule("norm", (Part("n", (), add),)), dropped("frequencies", "computed")])


def load(tmp_path, module, stored, disk, memory):
    from bioinit.backends.module import BACKEND
    from bioinit.load import execute

    save_file(stored, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        targets = describe(module)
        planned = plan(
            Model(targets, lambda key: "nothing"),
            checkpoint.tensors,
            Names(disk, memory),
            init=InitPolicy(),
            dtype="module",
        )
        report = execute(
            planned,
            module,
            checkpoint.files,
            checkpoint.tensors,
            backend=BACKEND,
            make=lambda: module,
            init=InitPolicy(),
            device=torch.device("cpu"),
        ).raise_for_problems()
    return planned, report


@pytest.mark.parametrize("stored_rows", [6, 7, 40])
@pytest.mark.parametrize("rows", [6, 8, 1000])
def test_rows_beyond_the_vocabulary_are_zero_whatever_lay_there(tmp_path, stored_rows, rows):
    stored = torch.cat([WORDS, torch.full((stored_rows - 6, 4), 99.0)])
    module = Padded(rows)
    load(
        tmp_path,
        module,
        {"words": stored, "norm": torch.ones(4)},
        table(stored_rows),
        table(rows),
    )
    assert torch.equal(module.words[:6], WORDS)
    assert not module.words[6:].any()


def test_a_plan_says_how_much_is_padding(tmp_path):
    planned, _ = load(
        tmp_path, Padded(8), {"words": WORDS, "norm": torch.ones(4)}, table(6), table(8)
    )
    claim = next(claim for claim in planned.tensors if claim.key == "words")
    assert "8 elements of padding are zero" in claim.rule and claim.bytes == 6 * 4 * 4


def test_without_a_word_about_filling_missing_rows_are_a_problem(tmp_path):
    with pytest.raises(PlanError, match="words"):
        load(
            tmp_path,
            Padded(8),
            {"words": WORDS, "norm": torch.ones(4)},
            table(6),
            table(8, fill=False),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_norm_that_is_stored_around_one_is_shifted_in_float32(tmp_path, dtype):
    stored = torch.tensor([1.0, 1.5, 0.25, 3.0], dtype=dtype)
    module = Padded(6, torch.bfloat16)
    planned, _ = load(
        tmp_path, module, {"words": WORDS, "norm": stored}, table(6, add=-1.0), table(6)
    )
    assert torch.equal(module.norm, torch.tensor([0.0, 0.5, -0.75, 2.0], dtype=torch.bfloat16))
    claim = next(claim for claim in planned.tensors if claim.key == "norm")
    assert "canonical = norm -1" in claim.rule


def test_the_same_shift_on_both_sides_is_a_copy(tmp_path):
    stored = torch.tensor([0.1, 0.2, 0.3, 0.4])  # which would not survive one off and one on
    module = Padded(6)
    load(tmp_path, module, {"words": WORDS, "norm": stored}, table(6, -1.0), table(6, -1.0))
    assert torch.equal(module.norm, stored)


def test_a_dropped_tensor_is_not_unused(tmp_path):
    stored = {"words": WORDS, "norm": torch.ones(4), "frequencies": torch.ones(9)}
    planned, _ = load(tmp_path, Padded(6), stored, table(6), table(6))
    assert not planned.unused
    assert any("frequencies (computed)" in note for note in planned.notes)


def test_a_plan_says_how_many_rows_are_left_out_as_padding(tmp_path):
    stored = torch.cat([WORDS, torch.full((4, 4), 99.0)])
    planned, _ = load(
        tmp_path, Padded(6), {"words": stored, "norm": torch.ones(4)}, table(10), table(6)
    )
    assert "rows beyond the vocabulary are left out: 4 of words" in planned.notes
    planned, _ = load(
        tmp_path, Padded(6), {"words": WORDS, "norm": torch.ones(4)}, table(6), table(6)
    )
    assert not any("vocabulary" in note for note in planned.notes)
