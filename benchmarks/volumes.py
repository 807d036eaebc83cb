"""How many bytes a start moves, by the formulas of ``docs/scale.md``; prints the table there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Start:
    """A checkpoint and the ranks that start from it.

    ``stored`` are its bytes, of which ``columns`` (a part of 1) are cut along columns by tensor
    parallelism. ``tensors`` and ``files`` count what is stored, ``claims`` the model's tensors.
    """

    stored: float
    columns: float
    tensors: int
    files: int
    claims: int
    tp: int = 1
    pp: int = 1
    ep: int = 1
    dp: int = 1

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.tp * self.pp * self.ep * self.dp

    @property
    def held(self) -> float:
        """Bytes of the shards of one rank, all tensors taken as divided by every axis but dp."""
        return self.stored / (self.tp * self.pp * self.ep)

    @property
    def amplification(self) -> float:
        """Bytes that a rank reads for each byte that it holds: columns come with their rows."""
        return 1 + self.columns * (self.tp - 1)

    def read(self, *, parallel: bool) -> float:
        """Bytes that all ranks read of weights."""
        return self.stored * self.amplification * (1 if parallel else self.dp)

    @property
    def headers(self) -> float:
        """Bytes that all ranks read of headers and index."""
        return self.ranks * self.tensors * HEADER_BYTES

    @property
    def opened(self) -> int:
        """Files that all ranks open for their headers."""
        return self.ranks * self.files

    def exchanged(self) -> float:
        """Bytes that a rank receives from its replicas under parallel load."""
        return self.held * (self.dp - 1) / self.dp

    @property
    def united(self) -> float:
        """Bytes that leave the store with the united evidence: all ranks fetch all claims."""
        return self.ranks * self.claims * CLAIM_BYTES if self.ranks > 1 else 0.0

    @property
    def planning(self) -> float:
        """Seconds that a rank needs to open and plan."""
        owned = self.claims / (self.pp * self.ep)
        return self.tensors * SECONDS_PER_TENSOR + owned * SECONDS_PER_CLAIM


HEADER_BYTES = 220
"""Of one tensor: its line in the index and its entry in a header."""

CLAIM_BYTES = 12
"""Of one claim in the united evidence, compressed."""

SECONDS_PER_TENSOR = 15e-6
SECONDS_PER_CLAIM = 60e-6

GIANT = {"stored": 2.814e12, "columns": 0.33, "tensors": 156_403, "files": 565, "claims": 104_403}
LLAMA = {"stored": 141e9, "columns": 0.36, "tensors": 723, "files": 31, "claims": 483}
CASES = {
    "70B, 8": Start(**LLAMA, tp=8),
    "70B, 64": Start(**LLAMA, tp=8, dp=8),
    "70B, 512": Start(**LLAMA, tp=8, pp=4, dp=16),
    "1.4T, 512": Start(**GIANT, tp=8, pp=8, ep=8),
    "1.4T, 4096": Start(**GIANT, tp=8, pp=16, ep=8, dp=4),
}


def main() -> None:
    """Print the table."""
    print(
        "| start | shards | read, off | read, on | received | headers | opens | store | planning |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, case in CASES.items():
        print(
            f"| {name} | {case.held / 1e9:.1f} GB | {case.read(parallel=False) / 1e12:.1f} TB | "
            f"{case.read(parallel=True) / 1e12:.1f} TB | {case.exchanged() / 1e9:.1f} GB | "
            f"{case.headers / 1e9:.2g} GB | {case.opened:,} | {case.united / 1e9:.2g} GB | "
            f"{case.planning:.2f} s |"
        )


if __name__ == "__main__":
    main()
