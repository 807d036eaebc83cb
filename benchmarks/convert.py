"""Hugging Face to NeMo 2 and back, beside the same thing in plain torch.

    python benchmarks/convert.py                     # 3 GB of Llama on tmpfs, 5 rounds
    python benchmarks/convert.py --quick             # seconds; for the tests
    python benchmarks/convert.py --work /scratch     # on another disk

The plain way is what importers and exporters of checkpoints do: load everything, transform, save.
It is written as well as it can be: tensors are copied once, straight into the stacked and fused
ones; safetensors and torch's DCP read and write. Both sides wait until the files are on the disk.
Ours also writes config, context and a receipt with the SHA-256 of every file; what that alone takes
is seen from the plain way that is followed by it, as ``sha256sum`` would be, a file per processor.

Each way runs in a fresh process, imports and a tiny conversion done before the clock; the ways
alternate round by round, and ratios are taken within a round. Memory is the largest RssAnon beyond
that at the start, seen every few milliseconds: pages of files do not count. Before the clock, once,
the outputs of both ways are held against each other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import checkpoints

FRONT = "module."
LAYERS = f"{FRONT}decoder.layers."
PLAIN, DIGESTED = "plain torch", "plain torch, digests too"
WAYS = ("bioinit", DIGESTED, PLAIN)
DIRECTIONS = ("hf to nemo2", "nemo2 to hf")


def plain_to_nemo2(source: Path, target: Path) -> None:
    """Load whole, fuse and stack, save with DCP."""
    import torch
    from safetensors.torch import load_file
    from torch.distributed import checkpoint as dcp

    config = json.loads((source / "config.json").read_text())
    state = load_file(source / "model.safetensors")
    count, hidden = config["num_hidden_layers"], config["hidden_size"]
    groups = config["num_key_value_heads"]
    each = config["num_attention_heads"] // groups
    dtype = state["model.norm.weight"].dtype
    found = {
        f"{FRONT}embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        f"{FRONT}decoder.final_layernorm.weight": state["model.norm.weight"],
        f"{FRONT}output_layer.weight": state["lm_head.weight"],
    }
    rows = state["model.layers.0.self_attn.k_proj.weight"].shape[0] * (each + 2)
    width = state["model.layers.0.mlp.gate_proj.weight"].shape[0]
    qkv = torch.empty(count, groups, rows // groups, hidden, dtype=dtype)
    first = torch.empty(count, 2, width, hidden, dtype=dtype)
    for number in range(count):
        at = f"model.layers.{number}."
        q, k, v = (
            state.pop(f"{at}self_attn.{n}_proj.weight").view(groups, -1, hidden) for n in "qkv"
        )
        torch.cat([q, k, v], 1, out=qkv[number])
        for half, name in enumerate(("gate", "up")):
            first[number, half].copy_(state.pop(f"{at}mlp.{name}_proj.weight"))
    found[f"{LAYERS}self_attention.linear_qkv.weight"] = qkv.view(count, rows, hidden)
    found[f"{LAYERS}mlp.linear_fc1.weight"] = first.view(count, 2 * width, hidden)
    for ours, theirs in _SIMPLE.items():
        parts = [state.pop(f"model.layers.{n}.{theirs}") for n in range(count)]
        found[f"{LAYERS}{ours}"] = torch.stack(parts)
    writer = dcp.FileSystemWriter(target, single_file_per_rank=False, thread_count=2)
    dcp.save(found, storage_writer=writer, no_dist=True)


def plain_to_hf(source: Path, target: Path) -> None:
    """Load whole with DCP, divide, save."""
    import torch
    from safetensors.torch import save_file
    from torch.distributed import checkpoint as dcp

    config = json.loads((source / "config.json").read_text())
    reader = dcp.FileSystemReader(source / "weights")
    state = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in reader.read_metadata().state_dict_metadata.items()
        if hasattr(stored, "size")
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    groups = config["num_key_value_heads"]
    each = config["num_attention_heads"] // groups
    hidden = config["hidden_size"]
    found = {
        "model.embed_tokens.weight": state[f"{FRONT}embedding.word_embeddings.weight"],
        "model.norm.weight": state[f"{FRONT}decoder.final_layernorm.weight"],
        "lm_head.weight": state[f"{FRONT}output_layer.weight"],
    }
    for number in range(config["num_hidden_layers"]):
        at = f"model.layers.{number}."
        fused = state[f"{LAYERS}self_attention.linear_qkv.weight"][number]
        fused = fused.view(groups, each + 2, -1, hidden)
        for name, part in zip("qkv", fused.split([each, 1, 1], 1), strict=True):
            found[f"{at}self_attn.{name}_proj.weight"] = part.reshape(-1, hidden)
        gate, up = state[f"{LAYERS}mlp.linear_fc1.weight"][number].chunk(2)
        found[f"{at}mlp.gate_proj.weight"], found[f"{at}mlp.up_proj.weight"] = gate, up
        for ours, theirs in _SIMPLE.items():
            found[at + theirs] = state[LAYERS + ours][number]
    target.mkdir(parents=True)
    save_file(found, target / "model.safetensors", metadata={"format": "pt"})
    for path in (target / "model.safetensors", target):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


_SIMPLE = {
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}


def way(name: str, direction: str) -> Callable[[Path, Path], None]:
    """The function that does it."""
    if name == "bioinit":
        import bioinit

        to = direction.rpartition(" ")[2]
        return lambda source, target: bioinit.convert(source, target, to) and None
    plain = plain_to_nemo2 if direction == DIRECTIONS[0] else plain_to_hf
    return (
        plain if name == PLAIN else lambda source, target: (plain(source, target), digest(target))
    )


def digest(folder: Path) -> None:
    """The SHA-256 of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(_digest, files))


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def once(name: str, direction: str, tiny: str, source: str, target: str) -> None:
    """One conversion in this fresh process, which talks to ``race`` by lines."""
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run = way(name, direction)
    with tempfile.TemporaryDirectory() as scratch:
        run(Path(tiny), Path(scratch, "out"))
    print("ready", file=answers, flush=True)
    sys.stdin.readline()
    begin, busy = time.perf_counter(), time.process_time()
    run(Path(source), Path(target))
    took = {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - busy}
    print(json.dumps(took), file=answers, flush=True)
    os._exit(0)


def race(name: str, direction: str, tiny: Path, source: Path, target: Path) -> dict[str, float]:
    """Seconds on the clock and of all processors, and bytes of memory at the most."""
    shutil.rmtree(target, ignore_errors=True)
    process = subprocess.Popen(
        [sys.executable, __file__, "--once", name, direction, str(tiny), str(source), str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise SystemExit(f"{name}, {direction}: exit {process.wait()}")
    before = peak = _anonymous(process.pid)
    process.stdin.write("go\n")
    process.stdin.flush()
    while not select.select([process.stdout], [], [], 0.003)[0]:
        peak = max(peak, _anonymous(process.pid))
    answer = process.stdout.readline()
    if not answer.strip():
        raise SystemExit(f"{name}, {direction}: exit {process.wait()}")
    process.wait()
    return {**json.loads(answer), "bytes": peak - before}


def _anonymous(pid: int) -> int:
    try:
        _, found, rest = Path(f"/proc/{pid}/status").read_text().partition("RssAnon:")
    except OSError:
        return 0
    return int(rest.split()[0]) * 1024 if found else 0


def compare(direction: str, one: Path, other: Path) -> None:
    """Raise unless both ways wrote the same values."""
    import torch

    import bioinit

    with bioinit.open_checkpoint(one) as mine, bioinit.open_checkpoint(other) as theirs:
        assert mine.tensors.keys() == theirs.tensors.keys(), direction
        for name in mine.tensors:
            assert torch.equal(mine.read(name), theirs.read(name)), (direction, name)


def sources(work: Path, size: checkpoints.Size) -> dict[str, Path]:
    """Where each direction begins; NeMo 2's is made by plain torch, with our context."""
    import torch
    import transformers
    from safetensors.torch import save_file

    import bioinit

    hf, nemo2 = work / "hf", work / "nemo2"
    config = transformers.LlamaConfig(**size.decoder, tie_word_embeddings=False)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(hf)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    torch.manual_seed(3)
    state = {
        name: torch.empty(tensor.shape, dtype=torch.bfloat16).uniform_(-1, 1)
        for name, tensor in model.state_dict().items()
    }
    save_file(state, hf / "model.safetensors", metadata={"format": "pt"})
    del state
    bioinit.convert(hf, nemo2, "nemo2")
    shutil.copy(hf / "config.json", nemo2)  # the plain way asks nobody else
    shutil.rmtree(nemo2 / "weights")
    plain_to_nemo2(hf, nemo2 / "weights")
    return dict(zip(DIRECTIONS, (hf, nemo2), strict=True))


def main() -> int:
    if sys.argv[1:2] == ["--once"]:
        once(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("/dev/shm"), help="where files lie")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="write every single measurement here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work, prefix="bioinit-convert-") as scratch:
        work = Path(scratch)
        warnings.simplefilter("ignore")
        tiny = sources(work / "quick", checkpoints.QUICK)
        large = tiny if options.quick else sources(work / "full", checkpoints.FULL)
        found: dict[str, dict[str, list[dict[str, float]]]] = {}
        for direction in DIRECTIONS:
            found[direction] = {name: [] for name in WAYS}
            outputs = {name: work / f"out{number}" for number, name in enumerate(WAYS)}
            for name in WAYS:
                race(name, direction, tiny[direction], large[direction], outputs[name])
            compare(direction, outputs[WAYS[0]], outputs[PLAIN])
            for number in range(1 if options.quick else options.rounds):
                turn = number % len(WAYS)
                for name in WAYS[turn:] + WAYS[:turn]:
                    for output in outputs.values():
                        shutil.rmtree(output, ignore_errors=True)
                    result = race(name, direction, tiny[direction], large[direction], outputs[name])
                    found[direction][name].append(result)
                    print(direction, name, result, file=sys.stderr, flush=True)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0


def table(found: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """Medians, and the medians of the ratios within rounds."""
    lines = ["| direction | way | seconds | of processors | memory | time to plain | memory |"]
    lines.append("|---|---|---|---|---|---|---|")
    for direction, ways in found.items():
        for name, runs in ways.items():
            pairs = list(zip(runs, ways[PLAIN], strict=True))
            cells = [
                statistics.median(one[what] / max(other[what], 1) for one, other in pairs)
                if what == "bytes"
                else statistics.median(one[what] / other[what] for one, other in pairs)
                for what in ("seconds", "bytes")
            ]
            seconds = statistics.median(run["seconds"] for run in runs)
            busy = statistics.median(run["cpu"] for run in runs)
            memory = statistics.median(run["bytes"] for run in runs) / 2**20
            lines.append(
                f"| {direction} | {name} | {seconds:.2f} | {busy:.2f} | {memory:.0f} MiB | "
                f"{cells[0]:.2f} | {cells[1]:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
