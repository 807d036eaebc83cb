"""``init.layers``: a model that has some of its checkpoint's layers, in the order asked for.

Layer ``i`` of the model is the checkpoint's layer ``layers[i]``. The count of layers becomes a fact
of the checkpoint before fields are merged; names are renumbered where the model's side meets the
canonical space; what belongs to other layers is left out before the plan is made, so neither bytes
nor files of it are touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from bioinit.errors import ConfigError
from bioinit.families.protocol import ReadFields
from bioinit.formats.protocol import StoredTensor
from bioinit.layout import Box
from bioinit.mapping import Mapping as NameMapping
from bioinit.mapping import Names, Placed
from bioinit.prefixes import Spelling
from bioinit.record import SavedField
from bioinit.rules import Rule

_COUNTS = ("num_layers", "num_hidden_layers", "n_layer", "n_layers")
_PER_LAYER = ("layer_types",)
_STACK = "layers"


class Layers:
    """The chosen layers of one checkpoint.

    Raises:
        ConfigError: the checkpoint does not have them, or nobody says how many it has.
    """

    def __init__(self, asked: tuple[int, ...] | int, saved: ReadFields | None) -> None:
        fields = {} if saved is None else saved.fields
        name = next((name for name in _COUNTS if name in fields), None)
        count = None if name is None else fields[name].value
        if name is None or not isinstance(count, int):
            raise ConfigError(
                f"init.layers={asked} chooses among the layers of the checkpoint, and no saved "
                "config says how many it has. Start from a checkpoint with its config, or leave "
                "init.layers out."
            )
        self.field = name
        said = f"init.layers={asked}, but {fields[name].where} says that the checkpoint has {count}"
        cure = f"Choose how many, from 1 to {count}, or a list of numbers from 0 to {count - 1}."
        if isinstance(asked, int) and not 1 <= asked <= count:
            raise ConfigError(f"{said} layers. {cure}")
        self.chosen = tuple(range(asked)) if isinstance(asked, int) else asked
        if not self.chosen or not all(0 <= number < count for number in self.chosen):
            raise ConfigError(f"{said} layers. {cure}")

    def counted(self, saved: ReadFields) -> ReadFields:
        """``saved``, with as many layers as were chosen."""
        fields = dict(saved.fields)
        was = fields[self.field]
        fields[self.field] = SavedField(len(self.chosen), True, f"{was.where}, by init.layers")
        for name in _PER_LAYER:
            held = fields.get(name)
            if held is not None and isinstance(held.value, tuple) and len(held.value) == was.value:
                kept = tuple(held.value[number] for number in self.chosen)
                fields[name] = SavedField(kept, held.literal, f"{held.where}, by init.layers")
        return saved._replace(fields=fields)

    def renumbered(self, names: Names, module: nn.Module) -> Names:
        """``names``, for a model whose layers are the chosen ones.

        Raises:
            ConfigError: layers of this architecture are computed from several stored tensors.
        """
        if names.conversions:
            raise ConfigError(
                f"init.layers cannot be used here: {names.conversions[0].text} makes tensors of "
                "this model, which are more than copies. Load all layers and drop some afterwards."
            )
        return names._replace(memory=_Renumbered(names.memory, self.chosen, self._stacks(module)))

    def of(
        self,
        stored: Mapping[str, StoredTensor],
        names: Names,
        spelling: Spelling,
        module: nn.Module,
    ) -> tuple[dict[str, StoredTensor], str]:
        """The stored tensors without those of other layers, and a sentence about them."""
        number = _number(self._stacks(module))
        chosen = {*map(str, self.chosen)}
        kept: dict[str, StoredTensor] = {}
        others: set[str] = set()
        for name, tensor in stored.items():
            layer = _layer(names.disk, spelling.spell(name), number)
            if layer is None or layer in chosen:
                kept[name] = tensor
            else:
                others.add(layer)
        gone = len(stored) - len(kept)
        said = f"init.layers takes the checkpoint's layers {list(self.chosen)}"
        more = f"; {gone} tensors of {len(others)} others are left out" if gone else ""
        return kept, said + more

    def is_left(self, module: nn.Module) -> Callable[[str], bool]:
        """Whether a canonical tensor belongs to a layer that was not chosen."""
        number = _number(self._stacks(module))
        chosen = {*map(str, self.chosen)}

        def is_left(key: str) -> bool:
            found = number.search(key)
            return found is not None and found[2] not in chosen

        return is_left

    def _stacks(self, module: nn.Module) -> frozenset[str]:
        """What stands before the number of a layer, in canonical names."""
        lists = {
            path.rpartition(".")[2]
            for path, inner in module.named_modules()
            if isinstance(inner, nn.ModuleList) and len(inner) == len(self.chosen)
        }
        return frozenset({*lists, _STACK})


class _Renumbered(NameMapping):
    """A table whose canonical layers are those of the checkpoint."""

    def __init__(self, inner: NameMapping, chosen: tuple[int, ...], stacks: frozenset[str]) -> None:
        super().__init__(inner.rules)
        self._inner = inner
        self._chosen = chosen
        self._number = _number(stacks)

    def rule_for(self, key: str) -> Rule | None:
        return self._inner.rule_for(key)

    def place(self, key: str, boxes: tuple[Box, ...]) -> list[Placed] | None:
        placed = self._inner.place(key, boxes)
        if placed is None:
            return None
        return [p._replace(key=self._number.sub(self._source, p.key, count=1)) for p in placed]

    def _source(self, found: re.Match[str]) -> str:
        return f"{found[1]}{self._chosen[int(found[2])]}{found[3]}"


def _number(stacks: frozenset[str]) -> re.Pattern[str]:
    return re.compile(rf"((?:^|\.)(?:{'|'.join(map(re.escape, sorted(stacks)))})\.)(\d+)(\.)")


def _layer(disk: NameMapping, name: str, number: re.Pattern[str]) -> str | None:
    """The layer that a stored tensor belongs to; None if to none, or to several."""
    rule = disk.rule_for(name)
    captures = None if rule is None else rule.match(name)
    if rule is None or captures is None or not rule.parts:
        return None
    part: Any = rule.parts[0]
    if 0 in part.each:  # the layers are stacked in one tensor
        return None
    found = number.search(part.key(captures, (0,) * len(part.each)))
    return None if found is None else found[2]
