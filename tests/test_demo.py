"""The demo's parts: the made sequences, the trained checkpoint, the plot."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "demo"
TINY = DEMO / "esm2_tiny"


@pytest.fixture(scope="module", autouse=True)
def demo_on_path():
    sys.path.insert(0, str(DEMO))
    yield
    sys.path.remove(str(DEMO))


def test_the_same_seed_makes_the_same_sequences():
    from proteins import make

    one, again, other = make(4, 40, seed=1), make(4, 40, seed=1), make(4, 40, seed=2)
    assert (one.residues == again.residues).all() and (one.states == again.states).all()
    assert (one.residues != other.residues).any()


def test_a_regular_segment_is_followed_by_a_coil():
    from proteins import COIL, make

    for row in make(32, 80, seed=3).states:
        changes = [(a, b) for a, b in pairwise(row) if a != b]
        assert changes and all(COIL in pair for pair in changes)


def test_helices_repeat_every_third_or_fourth_residue_and_strands_every_second():
    import numpy as np
    from proteins import HELIX, OILINESS, RESIDUES, STRAND, make

    made = make(400, 80, seed=4)
    oily = np.array([OILINESS[aa] for aa in RESIDUES])[made.residues]

    def together(state, distance):
        both = (made.states[:, :-distance] == state) & (made.states[:, distance:] == state)
        return np.corrcoef(oily[:, :-distance][both], oily[:, distance:][both])[0, 1]

    assert together(HELIX, 4) > 0.2 > -0.1 > together(HELIX, 2)
    assert together(STRAND, 2) > 0.2 > -0.1 > together(STRAND, 1)


def test_the_checkpoint_is_small_and_complete():
    names = {file.name for file in TINY.iterdir()}
    assert {"config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json"} <= names
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 1_500_000


def test_the_checkpoint_has_the_alphabet_of_esm2():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    assert len(tokenizer) == 33
    assert tokenizer("LAGV").input_ids == [0, 4, 5, 6, 7, 2]
    assert tokenizer.mask_token_id == 32


def test_the_checkpoint_has_learned_more_than_residue_frequencies():
    transformers = pytest.importorskip("transformers")
    import torch
    from pretrain import held_out_loss, unigram_loss

    model = transformers.EsmForMaskedLM.from_pretrained(TINY).eval()
    with torch.no_grad():
        assert held_out_loss(model, count=64) < unigram_loss() - 0.2


def test_the_plot_draws_each_curve_with_its_own_mark(tmp_path):
    from plot import png_plot, text_plot

    curves = {"low": [(0, 1.0), (10, 0.0)], "high": [(0, 1.0), (10, 0.9)]}
    text = text_plot(curves, width=20, height=11)
    rows = text.splitlines()
    assert rows[0].startswith(" 1.000 |+") and rows[10].endswith("o") and rows[1].endswith("+")
    assert "o  low" in text and "+  high" in text
    pytest.importorskip("matplotlib")
    png_plot(curves, tmp_path / "curves.png", "a title")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
