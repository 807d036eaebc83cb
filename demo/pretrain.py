"""Train the small ESM-2 of this demo by masked-LM and write it in Hugging Face layout.

    python demo/pretrain.py                 # a few minutes on two cores, writes demo/esm2_tiny
    python demo/pretrain.py --steps 20 --out /tmp/try

The alphabet is the real one of ESM-2 (33 tokens, in its order), the architecture is transformers'
own ``EsmForMaskedLM`` with rotary positions and token dropout; only the size and the data are
small.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch
from proteins import RESIDUES, make
from safetensors.torch import save_file
from torch import Tensor
from transformers import EsmConfig, EsmForMaskedLM, EsmTokenizer

HERE = Path(__file__).resolve().parent
ALPHABET = (
    "<cls> <pad> <eos> <unk> L A G V S E R T I D P K Q N F Y M H W C X B U Z O . - <null_1> <mask>"
).split()
CLS, PAD, EOS, MASK = (ALPHABET.index(t) for t in ("<cls>", "<pad>", "<eos>", "<mask>"))
TOKEN_OF_RESIDUE = torch.tensor([ALPHABET.index(aa) for aa in RESIDUES])
MASKED, KEPT_AS_MASK, SWAPPED = 0.15, 0.8, 0.1
HELD_OUT_SEED = 999_999_999


def config() -> EsmConfig:
    """The size that fits into 1.5 MB as float32."""
    return EsmConfig(
        vocab_size=len(ALPHABET),
        mask_token_id=MASK,
        pad_token_id=PAD,
        eos_token_id=EOS,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=384,
        max_position_embeddings=1026,
        position_embedding_type="rotary",
        token_dropout=True,
        emb_layer_norm_before=False,
        layer_norm_eps=1e-5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def tokens_of(residues: Tensor) -> Tensor:
    """Residue indices to ESM-2 tokens, with ``<cls>`` before and ``<eos>`` after."""
    ends = torch.empty(len(residues), 1, dtype=torch.long)
    return torch.cat([ends.fill_(CLS).clone(), TOKEN_OF_RESIDUE[residues], ends.fill_(EOS)], dim=1)


def mask(tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Choose 15 % of residues: 80 % of them become ``<mask>``, 10 % another one, 10 % stay."""
    draw = torch.rand(tokens.shape, generator=generator)
    chosen = (draw < MASKED) & (tokens != CLS) & (tokens != EOS)
    labels = tokens.masked_fill(~chosen, -100)
    fate = torch.rand(tokens.shape, generator=generator)
    other = TOKEN_OF_RESIDUE[torch.randint(len(RESIDUES), tokens.shape, generator=generator)]
    inputs = tokens.masked_fill(chosen & (fate < KEPT_AS_MASK), MASK)
    swapped = chosen & (fate >= KEPT_AS_MASK) & (fate < KEPT_AS_MASK + SWAPPED)
    return torch.where(swapped, other, inputs), labels


def pretrain(steps: int, batch: int, length: int, seed: int) -> EsmForMaskedLM:
    """Train on fresh sequences in every step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = EsmForMaskedLM(config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, min(100, steps // 10))

    def rate(step: int) -> float:
        done = max(0, step - warmup) / max(1, steps - warmup)
        return min((step + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    begin = time.perf_counter()
    for step in range(steps):
        tokens = tokens_of(
            torch.from_numpy(make(batch, length, seed=1_000_000 * seed + step).residues)
        )
        inputs, labels = mask(tokens, generator)
        loss = model(input_ids=inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.perf_counter() - begin
            print(f"step {step:5d}  masked-LM loss {loss.item():.4f}  {seconds:5.0f} s", flush=True)
    model.eval()
    return model


def held_out_loss(model: EsmForMaskedLM, count: int = 512) -> float:
    """The masked-LM loss on sequences that pretraining never saw."""
    tokens = tokens_of(torch.from_numpy(make(count, 62, seed=HELD_OUT_SEED).residues))
    inputs, labels = mask(tokens, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float(model(input_ids=inputs, labels=labels).loss)


def unigram_loss() -> float:
    """The loss of a guesser that knows only how common each residue is."""
    seen = torch.from_numpy(make(512, 62, seed=HELD_OUT_SEED).residues).flatten()
    odds = torch.bincount(seen, minlength=len(RESIDUES)).double() / len(seen)
    return float(-(odds * odds.log()).sum())


def hub_state(model: EsmForMaskedLM) -> dict[str, Tensor]:
    """The weights under the names that ESM-2 has on the hub.

    transformers 5 keeps one rotary table where the hub has one per layer, and would itself write
    older names (gamma, beta) for a model that it has not read from a file.
    """
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    del state["lm_head.decoder.weight"]  # tied to the embedding
    table = state.pop("esm.rotary_embeddings.inv_freq")
    for layer in range(model.config.num_hidden_layers):
        at = f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"
        state[at] = table.clone()
    return state


def save(model: EsmForMaskedLM, out: Path) -> None:
    """Write config, weights and tokenizer files."""
    out.mkdir(parents=True, exist_ok=True)
    model.config.architectures = ["EsmForMaskedLM"]
    model.config.dtype = "float32"
    model.config.save_pretrained(out)
    save_file(hub_state(model), out / "model.safetensors", metadata={"format": "pt"})
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocab.txt"
        vocabulary.write_text("\n".join(ALPHABET), encoding="utf-8")
        EsmTokenizer(str(vocabulary)).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=62)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "esm2_tiny")
    arguments = parser.parse_args()
    model = pretrain(arguments.steps, arguments.batch, arguments.length, arguments.seed)
    save(model, arguments.out)
    size = sum(f.stat().st_size for f in arguments.out.iterdir())
    print(
        f"held-out masked-LM loss {held_out_loss(model):.4f},"
        f" by residue frequencies alone {unigram_loss():.4f}; {arguments.out}: {size / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    main()
