"""Names of files as messages may show them."""

from __future__ import annotations


def shown(name: object) -> str:
    r"""``name`` on one line: what is not to be seen is spelled out.

    A file may be called anything but ``/``; a line end in its name would write lines of our own.

    >>> shown("a" + chr(10) + "b" + chr(0xDCFF))
    'a\\nb\\udcff'
    """
    text = str(name)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
