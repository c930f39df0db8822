"""The plan of the package: rooms, arrows between them, one file per paper, sizes. Bounds are the values reached."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from helpers.places import REPOSITORY

PACKAGE = REPOSITORY / "popo_lightning"
GROUND_FLOOR = {"__init__", "__main__", "data", "policy"}
MAX_ARROWS = 77  # between rooms; data and policy count as rooms
# Not counted: it follows from a call, `PolicyModule.load_from_checkpoint`, whose name is Lightning's.
BY_CALL = {("policy", "cli")}
LONGEST_FILE, LONGEST_FUNCTION = 300, 55
BELOW = {  # the most that rooms on the lowest floors, on which all others stand, may import
    "core": set(),
    "verifiers": {"core"},
    "grading": {"core"},
    "objectives": {"core"},
    "metrics": {"core"},
    "replay": {"core"},
    "toys": {"core"},
    "tasks": {"core", "verifiers", "grading"},
}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        found[".".join(parts)] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imported(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "popo_lightning":
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "popo_lightning"}
    return names


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    """Returns the rooms that each room imports from."""
    rooms: dict[str, set[str]] = defaultdict(set)
    for name, tree in modules().items():
        room = name.split(".")[1]
        for path in imported(tree):
            target = path.split(".")[1]
            if target not in (room, "__version__", "__init__") and (room, target) not in BY_CALL:
                rooms[room].add(target)
    return rooms


def test_the_ground_floor_has_four_files() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} <= GROUND_FLOOR


def test_arrows_go_down_and_are_few(arrows: dict[str, set[str]]) -> None:
    for room, below in BELOW.items():
        assert arrows.get(room, set()) <= below, f"{room} imports upward: {arrows[room] - below}"
    left = {room: set(targets) for room, targets in arrows.items()}
    while lowest := [room for room in left if not left[room] & set(left)]:
        for room in lowest:
            del left[room]
    assert not left, f"rooms that import each other in a circle, or stand above one: {left}"
    assert sum(map(len, arrows.values())) <= MAX_ARROWS


def test_folders_of_commands_stand_on_the_command_line(arrows: dict[str, set[str]]) -> None:
    """`popo estimate` reads policies as `popo export` does. Apart from that no command needs another one."""
    commands = {folder.name for folder in (PACKAGE / "cli").iterdir() if (folder / "__init__.py").exists()}
    found = set()
    for name, tree in modules().items():
        parts = name.split(".")[1:]
        if parts[0] == "cli":
            own = parts[1] if parts[1] in commands else "cli"
            targets = [path.split(".")[2] for path in imported(tree) if path.startswith("popo_lightning.cli.")]
            found |= {(own, target if target in commands else "cli") for target in targets}
    to_parser = {(command, "cli") for command in commands - {"plan", "show"}}
    assert {arrow for arrow in found if arrow[0] != arrow[1]} == {*to_parser, ("estimate", "export"), ("cli", "plan")}
    users = [room for room, targets in arrows.items() if "cli" in targets]
    assert users == ["__main__"]


def test_a_rooms_name_is_said_in_its_first_line() -> None:
    for room in PACKAGE.iterdir():
        if room.is_dir() and any(room.glob("*.py")):
            assert ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))), room


def test_a_paper_has_one_address(arrows: dict[str, set[str]]) -> None:
    """Only data and the command line import papers' files. No paper's file imports another, except POPO's family."""
    assert all("methods" not in targets for room, targets in arrows.items() if room not in ("data", "cli"))
    for name, tree in modules().items():
        if name.startswith("popo_lightning.methods."):
            others = {path.split(".")[2] for path in imported(tree) if path.startswith("popo_lightning.methods.")}
            family = {other for other in others if other.startswith("popo")}
            assert others == family and (not family or name.split(".")[2].startswith("popo")), (name, others)


def test_files_and_functions_are_short() -> None:
    for name, tree in modules().items():
        path = REPOSITORY / Path(*name.split(".")).with_suffix(".py")
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE, name
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
                lines = (node.end_lineno or 0) - body[0].lineno + 1
                assert lines <= LONGEST_FUNCTION, f"{name}.{node.name} has {lines} lines"


def test_every_method_names_classes_that_are_there() -> None:
    classes = {
        f"{name}.{node.name}"
        for name, tree in modules().items()
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
    for path in sorted((REPOSITORY / "configs").rglob("*.yaml")):
        for class_path in named(yaml.safe_load(path.read_text(encoding="utf-8"))):
            if class_path.startswith("popo_lightning."):
                assert class_path in classes, f"{path}: {class_path}"


def named(content: object) -> list[str]:
    """Returns every class_path in a YAML."""
    if isinstance(content, dict):
        own = [content["class_path"]] if isinstance(content.get("class_path"), str) else []
        return own + [path for value in content.values() for path in named(value)]
    if isinstance(content, list):
        return [path for value in content for path in named(value)]
    return []
