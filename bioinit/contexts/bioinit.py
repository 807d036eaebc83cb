"""Our own context: ``context/record.json``, which says which fields were set and by whom."""

from __future__ import annotations

from bioinit.contexts.protocol import Context, ContextKind
from bioinit.record import model_node, plain, read_context
from bioinit.storage import Folder


def _read(folder: Folder) -> Context | None:
    found = read_context(folder)
    if found is None:
        return None
    document, where = found
    node = model_node(document, where)
    return Context(
        dialect="bioinit",
        where=where,
        data=plain(node),
        model=node.get("$config"),
        tree=plain(document["record"]),
        raw=node,
    )


CONTEXT = ContextKind(read=_read, rank=9)
