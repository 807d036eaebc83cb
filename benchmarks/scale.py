"""Planning for one rank of thousands, in one process and without a cluster.

    python benchmarks/scale.py                       # rank 1500 of 4096; torch_dist: 8 layers
    python benchmarks/scale.py --only safetensors --profile

A checkpoint of 1.4 trillion parameters (``giant.py``) is opened, and one rank of TP 8, PP 16, EP 8,
DP 4 plans what it reads, in a fresh process per round with all imports done before the clock: the
saved config is read into the family's fields, both tables are made, wrapper prefixes are solved and
every target of the rank gets its claim. The targets are those of the rank's Megatron model, as
boxes; the model itself is not built. Memory is what resident memory grew by at its peak.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import giant
import torch
from giant import Giant

TP, PP, EP, DP = 8, 16, 8, 4
STACKED = Giant(layers=8)
"""What is written as ``torch_dist``: each chunk has a header, and a million take gigabytes."""

GOAL_SECONDS, GOAL_BYTES = 3.0, 500 * 10**6


class Place(NamedTuple):
    """Which part of the model a rank has."""

    tensor: int
    stage: int
    expert: int


def place_of(rank: int, tp: int = TP, pp: int = PP, ep: int = EP, dp: int = DP) -> Place:
    """Where Megatron's order of axes puts a rank: tensor, expert, data, pipeline."""
    stage = rank // (tp * ep * dp)
    return Place(rank % tp, stage % pp, rank // tp % ep)


def targets_of(model: Giant, place: Place, tp: int = TP, pp: int = PP, ep: int = EP) -> dict:
    """The targets of one rank."""
    from bioinit.layout import Box
    from bioinit.targets import Target

    hidden, ffn = model.hidden, model.ffn
    fused, queries = (model.heads + 2 * model.groups) * model.channels, model.heads * model.channels
    layers, experts = model.layers // pp, model.experts // ep

    def whole(shape: tuple[int, ...]) -> tuple[Box, ...]:
        return (Box.contiguous(shape),)

    def rows(shape: tuple[int, int], parts: int = 1) -> tuple[Box, ...]:
        """This rank's rows of each of ``parts`` equal parts, side by side in memory."""
        part, width = shape[0] // parts, shape[1]
        mine = part // tp
        return tuple(
            Box((n * part + place.tensor * mine, 0), (mine, width), n * mine * width, (width, 1))
            for n in range(parts)
        )

    def columns(shape: tuple[int, int]) -> tuple[Box, ...]:
        mine = shape[1] // tp
        return (Box((0, place.tensor * mine), (shape[0], mine), 0, (mine, 1)),)

    def tensors() -> Iterator[tuple[str, tuple[int, ...], tuple[Box, ...]]]:
        vocab = (model.vocab, hidden)
        if place.stage == 0:
            yield "embedding.word_embeddings.weight", vocab, rows(vocab)
        for layer in range(place.stage * layers, (place.stage + 1) * layers):
            at = f"decoder.layers.{layer}"
            yield f"{at}.input_layernorm.weight", (hidden,), whole((hidden,))
            yield (
                f"{at}.self_attention.linear_proj.weight",
                (hidden, queries),
                columns((hidden, queries)),
            )
            yield f"{at}.self_attention.linear_qkv.weight", (fused, hidden), rows((fused, hidden))
            yield f"{at}.pre_mlp_layernorm.weight", (hidden,), whole((hidden,))
            router = (model.experts, hidden)
            yield f"{at}.mlp.router.weight", router, whole(router)
            for expert in range(place.expert * experts, (place.expert + 1) * experts):
                inside = f"{at}.mlp.experts.local_experts.{expert}"
                first, second = (2 * ffn, hidden), (hidden, ffn)
                yield f"{inside}.linear_fc1.weight", first, rows(first, 2)
                yield f"{inside}.linear_fc2.weight", second, columns(second)
        if place.stage == pp - 1:
            yield "decoder.final_layernorm.weight", (hidden,), whole((hidden,))
            yield "output_layer.weight", vocab, rows(vocab)

    return {
        key: Target(key, shape, torch.bfloat16, boxes, False, True, None)
        for key, shape, boxes in tensors()
    }


def planned(folder: Path, targets: dict) -> tuple:
    """What ``initialize`` does between the path and the plan, the building of the model left out.

    Returns:
        The plan, and the digest over all headers that ranks compare.
    """
    from bioinit import collector

    with collector.paused():
        checkpoint, names, stored = opened(folder, targets)
        with checkpoint:
            return plan_of(targets, stored, names), checkpoint.digest


def opened(folder: Path, targets: dict) -> tuple:
    """The open checkpoint, the tables for these targets, and the stored tensors as spelled."""
    from bioinit import families
    from bioinit.families.mixtral import FAMILY
    from bioinit.initialize.across import described_by
    from bioinit.mapping import Mapping, Names
    from bioinit.sides import solved
    from bioinit.transforms.claims import expanded

    checkpoint = families.open_checkpoint(folder)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    config = described_by(FAMILY, checkpoint.context, {"backend": "megatron"}, shapes)
    dialect = families.dialect_in(FAMILY, checkpoint.context, checkpoint.tensors)
    live = {key: target.shape for key, target in targets.items()}
    memory = Mapping(FAMILY.dialects["megatron"].rules(config, live, ""))

    def names_of(asked: dict) -> Names:
        return Names(Mapping(FAMILY.dialects[dialect].rules(config, asked, "model.")), memory)

    names, spelling = solved(names_of, list(targets), shapes)
    names = expanded(names, shapes, dict.fromkeys(targets), spelling.spell)
    return checkpoint, names, checkpoint.tensors


def plan_of(targets: dict, stored: Mapping, names: object) -> object:
    """The plan of a rank; other ranks use what it does not."""
    from bioinit.config import InitPolicy
    from bioinit.plan import Model, plan

    model = Model(targets, lambda key: "normal")
    return plan(
        model,
        stored,
        names,
        init=InitPolicy(on_unused="report"),
        share=lambda mine: mine._replace(used=stored.keys()),
    )


def once(folder: str, rank: int, profile: bool, tolerant: bool = True) -> dict[str, object]:
    """In the fresh process: imports and a tiny checkpoint first, then the clock."""
    import tempfile

    place = place_of(rank)
    with tempfile.TemporaryDirectory(prefix="bioinit-scale-") as scratch:
        small = Path(scratch) / "small"
        giant.safetensors(small, giant.SMALL)
        planned(small, targets_of(giant.SMALL, Place(0, 0, 0), 2, 2, 2))
    is_stacked = Path(folder).name == "torch_dist"
    targets = (
        targets_of(STACKED, place._replace(stage=0), pp=1)
        if is_stacked
        else targets_of(Giant(), place)
    )
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    before = resident("VmRSS")
    begin, used = time.perf_counter(), time.process_time()
    made, digest = (
        _profiled(planned, Path(folder), targets) if profile else planned(Path(folder), targets)
    )
    seconds, used = time.perf_counter() - begin, time.process_time() - used
    if made.problems and not tolerant:
        raise SystemExit(f"{len(made.problems)} problems, first: {made.problems[0]}")
    return {
        "seconds": seconds,
        "cpu_seconds": used,
        "bytes": resident("VmHWM") - before,
        "targets": len(targets),
        "copies": sum(len(each.copies) for each in made.targets.values()),
        "bytes_to_read": made.bytes_to_read,
        "bytes_of_shards": made.memory_parameters,
        "digest": digest[:12],
    }


def _profiled(call: Callable, *arguments: object) -> object:
    import cProfile
    import pstats

    profile = cProfile.Profile()
    result = profile.runcall(call, *arguments)
    pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(35)
    return result


def resident(what: str) -> int:
    """A line of ``/proc/self/status`` in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, required=True, help="a file system with sparse files")
    parser.add_argument("--only", default="safetensors,torch_dist")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--once", help="only plan from what lies here, once")
    chosen = parser.parse_args()
    if chosen.once:
        print(json.dumps(once(chosen.once, chosen.rank, chosen.profile)))
        return
    for name in chosen.only.split(","):
        folder = chosen.work / name
        if not (folder / "config.json").exists():
            if name == "safetensors":
                giant.safetensors(folder, Giant())
            else:
                giant.torch_dist(folder, STACKED, TP)
        rounds = []
        for _ in range(chosen.rounds):
            command = [sys.executable, __file__, "--once", str(folder), "--rank", str(chosen.rank)]
            command += ["--work", str(chosen.work)] + ["--profile"] * chosen.profile
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rounds.append(json.loads(done.stdout.splitlines()[-1]))
        found = {**rounds[-1], "format": name}
        found["seconds"] = statistics.median(each["seconds"] for each in rounds)
        found["bytes"] = max(each["bytes"] for each in rounds)
        found["within"] = found["seconds"] <= GOAL_SECONDS and found["bytes"] <= GOAL_BYTES
        print(json.dumps(found))


if __name__ == "__main__":
    main()
