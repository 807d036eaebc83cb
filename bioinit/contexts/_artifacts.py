"""Files that a saved config names or that lie beside it, and go along when a model is saved."""

from __future__ import annotations

from pathlib import PurePosixPath

from bioinit.errors import RefusedCheckpoint

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)

CARRIED_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    *TOKENIZER_FILES,
)
"""Files that go along with a model, by the only names that a saved config may give them."""


def inside(text: str, where: str, at: str) -> PurePosixPath:
    """The path ``text``, which stands at ``at`` of the config ``where``.

    Raises:
        RefusedCheckpoint: it leads out of the checkpoint.
    """
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or "\0" in text:
        raise RefusedCheckpoint(
            f"{where}: {at:.200} is {text!r:.200}, which leads out of the checkpoint. A file that "
            "was saved along is named relative to its folder: correct the path, or get the "
            "checkpoint from a source you trust."
        )
    return path
