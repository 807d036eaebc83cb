"""Protein-like sequences from a written-down process: hidden segments, then residues.

These are not proteins. No sequence data base is read: every residue is drawn from the tables in
this file, so the demo needs no download and anybody can make the same data again from a seed.

1. Hidden states. A sequence is a chain of segments, each a helix, a strand or a coil, with its own
   range of lengths. A regular segment (helix, strand) is followed by a coil; a coil by a helix or a
   strand, with equal odds.
2. Residues. Each state weighs the twenty amino acids by how much they like to be there
   (``PROPENSITY``).
3. Periodicity. Helix and strand have one oily face. The wish for an oily residue at position i is a
   cosine that turns 100 degrees per residue in a helix (so i, i+3, i+4 agree) and 180 in a strand
   (so i, i+2 agree).
4. Motifs. A helix is capped by one of S, T, D, N before it begins and by G after it ends; a coil of
   at least four residues may carry one of a few fixed turns (``TURNS``) in its middle.

Propensities are weak and periodicity is strong on purpose: one residue alone says little about its
state, its neighbours say much. That is what a body learns from sequences without labels, and what
few labels cannot teach.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RESIDUES = "LAGVSERTIDPKQNFYMHWC"
STATES = ("helix", "strand", "coil")
HELIX, STRAND, COIL = range(3)

LENGTHS = {HELIX: (10, 24), STRAND: (6, 11), COIL: (4, 9)}
TURN_DEGREES = {HELIX: 100.0, STRAND: 180.0}
PHASES = 36
PERIODICITY = 2.2
TURNS = ("DG", "NG", "PG", "PDG", "GNG")
TURN_ODDS = 0.5
CAP_ODDS = 0.6

OILINESS = {
    "L": 1.0, "I": 1.0, "V": 0.9, "F": 1.0, "M": 0.8, "W": 0.7, "A": 0.3, "Y": 0.4, "C": 0.5,
    "T": -0.2, "G": -0.1, "S": -0.4, "H": -0.4, "P": -0.4, "Q": -0.8, "N": -0.8, "E": -1.0,
    "D": -1.0, "K": -1.0, "R": -0.9,
}  # fmt: skip
PROPENSITY = {
    HELIX: {
        "A": 0.5, "L": 0.4, "E": 0.5, "M": 0.4, "Q": 0.3, "K": 0.3, "R": 0.3,
        "G": -0.9, "P": -1.6, "S": -0.2,
    },
    STRAND: {
        "V": 0.6, "I": 0.6, "Y": 0.5, "F": 0.4, "W": 0.3, "T": 0.5, "C": 0.3,
        "P": -1.2, "G": -0.5, "D": -0.5,
    },
    COIL: {
        "G": 0.6, "P": 0.6, "N": 0.5, "D": 0.5, "S": 0.4,
        "L": -0.2, "I": -0.3, "V": -0.2, "M": -0.3, "W": -0.2,
    },
}  # fmt: skip
COMMONNESS = {
    "L": 9.9, "A": 8.3, "G": 7.1, "V": 6.9, "S": 6.6, "E": 6.7, "R": 5.5, "T": 5.3, "I": 5.9,
    "D": 5.5, "P": 4.7, "K": 5.8, "Q": 3.9, "N": 4.1, "F": 3.9, "Y": 2.9, "M": 2.4, "H": 2.3,
    "W": 1.1, "C": 1.4,
}  # fmt: skip


class Proteins(NamedTuple):
    """Sequences of equal length: residues as indices into ``RESIDUES``, and the hidden states."""

    residues: np.ndarray
    states: np.ndarray


def _cumulative_odds() -> np.ndarray:
    """For each state and phase, the cumulative odds of the twenty residues."""
    oiliness = np.array([OILINESS[aa] for aa in RESIDUES])
    common = np.log([COMMONNESS[aa] for aa in RESIDUES])
    angles = np.cos(2 * np.pi * np.arange(PHASES) / PHASES)
    odds = np.zeros((len(STATES), PHASES, len(RESIDUES)))
    for state in range(len(STATES)):
        liking = common + np.array([PROPENSITY[state].get(aa, 0.0) for aa in RESIDUES])
        wave = angles if state in TURN_DEGREES else np.zeros(PHASES)
        odds[state] = np.exp(liking + PERIODICITY * wave[:, None] * oiliness)
    odds /= odds.sum(-1, keepdims=True)
    return odds.cumsum(-1)


_CUMULATIVE = _cumulative_odds()


def _segments(rng: np.random.Generator, length: int) -> list[tuple[int, int, int]]:
    """Draw (state, start, end) until ``length`` residues are covered; the last one is cut."""
    segments = []
    position = 0
    state = COIL if rng.random() < 0.5 else int(rng.integers(2))
    while position < length:
        shortest, longest = LENGTHS[state]
        end = min(position + int(rng.integers(shortest, longest + 1)), length)
        segments.append((state, position, end))
        position = end
        state = int(rng.integers(2)) if state == COIL else COIL
    return segments


def make(count: int, length: int, seed: int) -> Proteins:
    """Make ``count`` sequences of ``length`` residues; the same seed gives the same sequences."""
    rng = np.random.default_rng(seed)
    states = np.empty((count, length), dtype=np.int64)
    phases = np.zeros((count, length), dtype=np.int64)
    motifs: list[tuple[int, int, str]] = []
    for row in range(count):
        for state, start, end in _segments(rng, length):
            states[row, start:end] = state
            if state in TURN_DEGREES:
                degrees = rng.random() * 360 + TURN_DEGREES[state] * np.arange(end - start)
                phases[row, start:end] = (degrees / 360 * PHASES).astype(np.int64) % PHASES
            elif end - start >= 4 and rng.random() < TURN_ODDS:
                motifs.append((row, (start + end) // 2 - 1, TURNS[rng.integers(len(TURNS))]))
            if state == HELIX and start > 0 and rng.random() < CAP_ODDS:
                motifs.append((row, start - 1, "STDN"[rng.integers(4)]))
            if state == HELIX and end < length and rng.random() < CAP_ODDS:
                motifs.append((row, end, "G"))
    draws = rng.random((count, length, 1))
    residues = (draws > _CUMULATIVE[states, phases]).sum(-1).clip(max=len(RESIDUES) - 1)
    for row, start, motif in motifs:
        for offset, letter in enumerate(motif):
            if start + offset < length:
                residues[row, start + offset] = RESIDUES.index(letter)
    return Proteins(residues, states)
