"""The staircase, enforced. If this stops you, move the line, not the rule."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "bioinit"
STAIRCASE = (  # reading order is import order: import only what stands before you
    "version collector errors keys siblings layout shards rules mapping transforms rulebook "
    "prefixes storage unpickle ranks record config targets formats contexts backends families "
    "parallelize merge report describe plan sides load save recipe convert cache initialize "
    "integrations migrate compat cli __main__ __init__"
).split()
CORRIDORS = ("formats", "contexts", "backends", "families", "integrations", "compat")
MODULES = sorted(HOUSE.rglob("*.py"))
ROOMS = {path.relative_to(HOUSE).parts[0].removesuffix(".py") for path in MODULES}
WRITES = re.compile(r"(copy|set|add|sub|mul|div|fill|zero|normal|uniform|trunc_normal|index_copy)_")
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(HOUSE)))


def room_of(path: Path) -> str:
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


def modules_imported(path: Path) -> set[str]:
    """Dotted bioinit modules that ``path`` imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write absolute imports: a reader must see the room"
            is_package = node.module in ("bioinit", *(f"bioinit.{c}" for c in CORRIDORS))
            found.update(
                f"{node.module}.{alias.name}" if is_package else str(node.module)
                for alias in node.names
            )
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name.split(".")[0] == "bioinit"}


def rooms_imported(path: Path) -> set[str]:
    named = {[*name.split("."), "__init__"][1] for name in modules_imported(path)}
    # `from bioinit import compose` names no room: it is the front door.
    return {room if room in STAIRCASE or room in ROOMS else "__init__" for room in named}


def writes(tree: ast.AST) -> Iterator[str]:
    """Statements that change a tensor in place."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if WRITES.fullmatch(node.func.attr):
                yield ast.unparse(node)
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            held = [t for t in targets if isinstance(t, ast.Attribute) and t.attr == "data"]
            if any(ast.unparse(attribute.value) != "self" for attribute in held):
                yield ast.unparse(node)


@each_module
def test_every_room_has_a_place_on_the_staircase(path):
    assert room_of(path) in STAIRCASE


def test_the_design_names_every_room_in_order():
    rows = re.findall(r"^\| `(\w+)/?` \|", (ROOT / "docs/design.md").read_text(), re.MULTILINE)
    assert [row for row in rows if row in STAIRCASE] == STAIRCASE


@each_module
def test_imports_only_go_downstairs(path):
    here = room_of(path)
    above = {r for r in rooms_imported(path) - {here} if STAIRCASE.index(r) > STAIRCASE.index(here)}
    assert not above, f"{here} may not import {sorted(above)}: they stand above it"


@pytest.mark.parametrize("corridor", CORRIDORS)
def test_siblings_do_not_know_each_other(corridor):
    folder = HOUSE / corridor
    names = {p.stem for p in folder.glob("[!_]*") if p.suffix == ".py" or p.is_dir()} - {"protocol"}
    for path in set(folder.rglob("*.py")) - set(folder.glob("_*.py")):
        sibling = path.relative_to(folder).parts[0].removesuffix(".py")
        known = {m.split(".")[2] for m in modules_imported(path) if m.count(".") > 1
                 and m.startswith(f"bioinit.{corridor}.")}  # fmt: skip
        assert not known & (names - {sibling}), f"{path.name} imports {sorted(known)}"


@each_module
def test_a_room_fits_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 400, "split it, or promote it to a folder"


def test_no_drawer_for_odds_and_ends():
    assert not [p for p in MODULES if p.stem in {"utils", "helpers", "common", "misc", "base"}]


@each_module
def test_only_load_writes_into_a_model(path):
    assert room_of(path) == "load" or not list(writes(ast.parse(path.read_text())))


@each_module
def test_only_the_command_line_prints_and_nobody_configures_logging(path):
    calls = [
        node.func
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
    ]
    named = {f.id if isinstance(f, ast.Name) else f.attr for f in calls}
    assert room_of(path) == "cli" or "print" not in named
    assert "basicConfig" not in named


@pytest.mark.parametrize(
    "line",
    ["p.copy_(q)", "p.data = q", "p.data += q", "torch.nn.init.normal_(p)", "p.set_(q)"],
)
def test_the_rule_about_writing_sees_every_way_to_write(line):
    assert list(writes(ast.parse(line)))
