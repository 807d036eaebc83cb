"""What a person typed after the verb: ``key=value`` words, and the sweeps in them.

Every word is parsed by Hydra's own grammar, so lists, mappings, quotes and sweeps mean what Hydra
users expect. Two things differ. Paths are taken as they stand, whatever characters they hold. And a
person never writes ``+``: all keys of the schema exist, and the schema says which names do not.

>>> Word.typed("model.initial_ckpt_path=runs/epoch=0-step=9, again").value
'runs/epoch=0-step=9, again'
>>> [job.overrides for job in jobs(["recipe=esm2/masked_lm", "init.seed=1,2"], multirun=True)]
[('init.seed=1',), ('init.seed=2',)]
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString, ValueType
from hydra.errors import HydraException

from bioinit.errors import ConfigError
from bioinit.keys import suggestion
from bioinit.recipe import sources

PATH_KEYS = ("model.initial_ckpt_path", "output_dir")
_KEY = re.compile(r"[\w-]+(\.[\w-]+)*")
_NULLS = ("null", "None", "~", "")


@dataclass(frozen=True)
class Word:
    """One ``key=value`` as it was typed."""

    text: str
    key: str
    value: str

    @classmethod
    def typed(cls, text: str) -> Word:
        """Split ``text`` at its first ``=``.

        Raises:
            ConfigError: it has no ``=``, or its key is none (``+key``, ``~key``, ``hydra.*``).
        """
        key, equals, value = text.partition("=")
        bare = key.strip().lstrip("+~")
        if key.startswith("+"):
            raise ConfigError(f"{text!r}: no + is needed here. Write {bare}={value}")
        if key.startswith("~"):
            raise ConfigError(
                f"{text!r}: a key cannot be deleted. Write {bare}=null, or leave it out."
            )
        if not equals:
            raise ConfigError(f"{text!r} is not key=value. Write for example {bare}=1")
        if not _KEY.fullmatch(key.strip()):
            raise ConfigError(
                f"{text!r}: {key!r} is not a key. A key is a dotted name, as in model.num_labels=3."
            )
        if bare.split(".")[0] == "hydra":
            raise ConfigError(
                f"{text!r}: Hydra composes recipes here and runs nothing, so its own settings have "
                "no effect. Leave it out; output_dir says where results go."
            )
        return cls(text, bare, value)

    @property
    def is_path(self) -> bool:
        return self.key in PATH_KEYS

    @property
    def chooses_preset(self) -> bool:
        """Whether this names an option of a config group, as ``model=esm2_3b`` does."""
        return self.key in sources.GROUPS and not self.value.lstrip().startswith("{")

    @property
    def path(self) -> str | None:
        """The value of a path, literally: ``null`` is None, outer quotes are not kept."""
        if self.value in _NULLS:
            return None
        quoted = len(self.value) > 1 and self.value[0] == self.value[-1] and self.value[0] in "'\""
        return self.value[1:-1] if quoted else self.value

    def parsed(self) -> Override:
        """The word in Hydra's grammar.

        Raises:
            ConfigError: the value is not valid in that grammar.
        """
        try:
            [override] = OverridesParser.create().parse_overrides([f"{self.key}={self.value}"])
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"cannot read {self.text!r}: {reason}. Quote the value for Hydra and the shell: "
                f"{self.key}='\"...\"'."
            ) from None
        return override

    def swept(self) -> list[str]:
        """The words this one stands for: itself, or one for each value of its sweep."""
        if self.is_path:
            return [self.text]
        override = self.parsed()
        if not override.is_sweep_override():
            return [self.text]
        if override.value_type in (ValueType.INTERVAL_SWEEP, ValueType.GLOB_CHOICE_SWEEP):
            raise ConfigError(
                f"{self.text!r} cannot be swept one by one. Write the values: {self.key}=a,b,c"
            )
        return [f"{self.key}={value}" for value in override.sweep_string_iterator()]

    def check(self) -> None:
        """Raise a :class:`ConfigError` if this is no single value, or names no preset."""
        if self.is_path:
            return
        if self.parsed().is_sweep_override():
            raise ConfigError(
                f"{self.text!r} has several values. For a list write {self.key}=[{self.value}]; "
                f"for one text quote it, {self.key}='\"{self.value}\"'; to run them all add "
                "--multirun."
            )
        known = sources.options(self.key) if self.chooses_preset else ()
        if self.chooses_preset and self.value not in (*known, "null"):
            hint = suggestion(self.value, known) or f"Known: {', '.join(known)}."
            raise ConfigError(
                f"{self.text!r}: there is no {self.key} preset {self.value!r}. {hint}"
            )


@dataclass(frozen=True)
class Job:
    """One run: a recipe and single-valued overrides. ``number`` counts from 0 in a sweep."""

    recipe: str
    overrides: tuple[str, ...]
    number: int | None = None


def jobs(typed: Sequence[str], *, multirun: bool = False) -> tuple[Job, ...]:
    """The runs that the words of a command line ask for, the last word varying fastest.

    Raises:
        ConfigError: no recipe or two are named, or a word cannot be read.
    """
    words = [Word.typed(text) for text in typed]
    named = [word for word in words if word.key == "recipe"]
    if len(named) != 1:
        found = f"{len(named)} recipes are named" if named else "no recipe is named"
        raise ConfigError(
            f"{found}, one is needed. Write recipe=NAME, for example recipe=auto/as_saved; "
            "`bioinit recipes` lists all of them."
        )
    rest = [word for word in words if word.key != "recipe"]
    if not multirun:
        return (Job(named[0].value, tuple(word.text for word in rest)),)
    every_recipe = [text.partition("=")[2] for text in named[0].swept()]
    combinations = itertools.product(every_recipe, *(word.swept() for word in rest))
    return tuple(
        Job(recipe, tuple(overrides), number)
        for number, (recipe, *overrides) in enumerate(combinations)
    )


def fields(typed: Sequence[str]) -> dict[str, Any]:
    """What ``field=value`` words say of one config, as nested plain data.

    Raises:
        ConfigError: a word cannot be read, has several values, or says a second time what another
            one has said.
    """
    found: dict[str, Any] = {}
    for text in typed:
        word = Word.typed(text)
        word.check()
        *way, last = word.key.split(".")
        inner = found
        for key in way:
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{text!r}: {key!r} has a value of its own already.")
        if last in inner:
            raise ConfigError(f"{text!r}: {word.key} is set twice. Leave one of them out.")
        inner[last] = _plain(word.parsed().value())
    return found


def _plain(value: Any) -> Any:
    """A parsed value without Hydra's marks of what stood in quotes."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return value
