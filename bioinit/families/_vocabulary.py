"""How many tokens a checkpoint of Megatron knows, whose embedding has more rows than that.

The saved config says it in newer versions only. Otherwise the tokenizer does, where its files lie
beside the weights; and where nobody does, the rows are all there is to go by.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bioinit.contexts.protocol import Context
from bioinit.families.protocol import SourceField
from bioinit.layout import Dims
from bioinit.record import SavedField
from bioinit.storage import File

_FIELD = "vocab_size"
_FILE = "tokenizer.json"
_LARGEST = 256 << 20
_EMBEDDINGS = ("embedding.word_embeddings.weight", "language_model.embedding.weight")


def vocabulary(
    context: Context, shapes: Mapping[str, Dims]
) -> tuple[dict[str, SavedField], tuple[SourceField, ...]]:
    """What the tokenizer or the stored rows say of the vocabulary, and that it was they."""
    if context.data.get(_FIELD) is not None:
        return {}, ()
    rows = _rows(shapes)
    counted = next((count for f in _tokenizers(context) if (count := _tokens(f)) is not None), None)
    said = "the saved config does not say it"
    if counted is not None and (rows is None or counted <= rows):
        how = f"the tokens of {_FILE}"
    elif rows is not None:
        counted, how = rows, "the rows of the stored embedding, padding included if there is any"
    else:
        return {}, ()
    found = SavedField(counted, False, f"{context.where}: {how}, since {said}")
    return {_FIELD: found}, (SourceField(_FIELD, "mapped", f"{_FIELD}, from {how}: {said}"),)


def _rows(shapes: Mapping[str, Dims]) -> int | None:
    return next((s[0] for key, s in shapes.items() if key.endswith(_EMBEDDINGS) and s), None)


def _tokenizers(context: Context) -> list[File]:
    return [c.carried[_FILE] for c in (context, *context.beside) if _FILE in c.carried]


def _tokens(file: File) -> int | None:
    """One more than the largest number that ``tokenizer.json`` gives a token; None if unclear."""
    if file.size > _LARGEST:
        return None
    try:
        tree: Any = json.loads(file.read(0, file.size))
        vocab = tree["model"]["vocab"]
        numbers = list(vocab.values()) if isinstance(vocab, dict) else [len(vocab) - 1]
        numbers += [token["id"] for token in tree.get("added_tokens") or ()]
        return max(int(number) for number in numbers) + 1
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
