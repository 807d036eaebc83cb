"""What a pretrained start is worth: `make demo`.

1. Start a token classifier from ``demo/esm2_tiny`` with bioinit: print the plan, load, print the
   receipt.
2. Start the same classifier again with the body's prefix on the skip list, so that nothing is
   loaded. Initial values depend on the seed and a parameter's name alone, so both runs begin with
   the same head.
3. Fine-tune both on the same few labelled sequences and plot the loss on sequences neither has
   seen.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import torch
from plot import png_plot, text_plot
from pretrain import tokens_of
from proteins import STATES, make
from torch import Tensor, nn

import bioinit

HERE = Path(__file__).resolve().parent
LENGTH = 62
HEAD = "classifier"
BODY = "esm"


class Labelled:
    """Sequences as ESM-2 tokens with one hidden state per residue; the ends carry no label."""

    def __init__(self, count: int, seed: int) -> None:
        made = make(count, LENGTH, seed)
        self.tokens = tokens_of(torch.from_numpy(made.residues))
        self.labels = torch.full_like(self.tokens, -100)
        self.labels[:, 1:-1] = torch.from_numpy(made.states)


def start(out: Path, *overrides: str) -> bioinit.Initialized:
    """One recipe, one checkpoint: the model that bioinit initialized, its plan and its report."""
    record = bioinit.compose(
        "esm2/token_classification",
        [
            f"model.initial_ckpt_path={HERE / 'esm2_tiny'}",
            f"model.num_labels={len(STATES)}",
            f"output_dir={out}",
            "output.overwrite=true",
            *overrides,
        ],
    )
    return bioinit.initialize(record)


def held_out_loss(model: nn.Module, data: Labelled) -> tuple[float, float]:
    """Mean loss and accuracy."""
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=data.tokens).logits
    known = data.labels != -100
    loss = nn.functional.cross_entropy(logits[known], data.labels[known])
    return float(loss), float((logits[known].argmax(-1) == data.labels[known]).float().mean())


def fine_tune(
    model: nn.Module, few: Labelled, held_out: Labelled, steps: int
) -> tuple[list[tuple[int, float]], float]:
    """Train on the few labels; return the held-out loss by step and the last accuracy."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01)
    loss, accuracy = held_out_loss(model, held_out)
    curve = [(0, loss)]
    for step in range(1, steps + 1):
        rows = torch.randint(len(few.tokens), (16,), generator=generator)
        model.train()
        model(input_ids=few.tokens[rows], labels=few.labels[rows]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 20) == 0:
            loss, accuracy = held_out_loss(model, held_out)
            curve.append((step, loss))
    return curve, accuracy


def same_head(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models begin with bit-equal heads."""
    left = {k: v for k, v in one.state_dict().items() if k.startswith(HEAD + ".")}
    right = other.state_dict()
    return bool(left) and all(torch.equal(v, right[k]) for k, v in left.items())


def receipt_lines(path: Path) -> str:
    """The receipt in a few lines; the file has every parameter."""
    receipt = json.loads(path.read_text())
    source = receipt["checkpoint"]
    claims = Counter(tensor["claim"] for tensor in receipt["tensors"])
    counted = ", ".join(f"{count} {claim}" for claim, count in sorted(claims.items()))
    return (
        f"{path}\n"
        f"  checkpoint {source['format']}, {source['tensors']} tensors, {source['bytes']:,} bytes,"
        f" digest {source['digest'][:12]}\n"
        f"  tensors    {counted}; {len(receipt['unused'])} stored ones unused\n"
        f"  problems   {len(receipt['problems'])}\n"
        f"  wrote      {', '.join(f['path'] for f in receipt['files'])}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--labelled", type=int, default=48)
    parser.add_argument("--out", type=Path, default=HERE.parent / "demo-out")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    begin = time.perf_counter()

    print("== Start from demo/esm2_tiny with a new head\n")
    done = start(arguments.out / "pretrained")
    print(done.plan.render())
    done.report.raise_for_problems()
    print("\n== Receipt\n")
    print(receipt_lines(arguments.out / "pretrained" / "receipt.json"))

    bare = start(
        arguments.out / "from_nothing",
        f"model.initial_ckpt_skip_keys_with_these_prefixes=[{BODY},{HEAD}]",
    )
    if not same_head(done.model, bare.model):
        raise SystemExit("the two heads differ: the comparison below would not be fair")

    few, held_out = Labelled(arguments.labelled, seed=11), Labelled(128, seed=12)
    print(
        f"\n== Fine-tune on {arguments.labelled} labelled sequences, {arguments.steps} steps each:"
        " which residue is helix, strand or coil?\n"
    )
    curves, accuracies = {}, {}
    for name, model in (("pretrained body", done.model), ("same head, no pretraining", bare.model)):
        curves[name], accuracies[name] = fine_tune(model, few, held_out, arguments.steps)
    print(text_plot(curves))
    for name, curve in curves.items():
        best = min(loss for _, loss in curve)
        print(
            f"        {name}: held-out loss {curve[-1][1]:.3f} (best {best:.3f}),"
            f" accuracy {accuracies[name]:.1%}"
        )
    picture = arguments.out / "losses.png"
    png_plot(curves, picture, "Held-out loss, token classification from few labels")
    done.model.save_pretrained(arguments.out / "finetuned")
    print(f"\nPicture: {picture}\nThe start, before fine-tuning: {arguments.out / 'pretrained'}")
    print(
        f"The fine-tuned model: {arguments.out / 'finetuned'} (transformers reads both as they are)"
    )
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
