"""The rooms of the package: each imports only from rooms below it, and none knows agentrl."""

import ast
from pathlib import Path

import retrievers

PACKAGE = Path(retrievers.__file__).parent
FLOORS = [
    {"base"},
    {"batching", "models", "names", "secrets"},
    {"index", "clients"},
    {"lucene", "dense", "stages"},
    {"backends", "service"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported(file):
    """What a file imports or names for `importlib`, as dotted names."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def test_every_module_stands_on_a_floor_and_imports_none_above_or_beside_its_own_room():
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        place = file.relative_to(PACKAGE).with_suffix("").parts
        if place == ("__init__",):
            continue
        assert place[0] in FLOOR_OF, f"{place[0]} stands on no floor; name its floor above"
        for name in imported(file):
            if name.startswith("agentrl"):
                wrong.append(f"{'.'.join(place)} imports {name}")
            if not name.startswith("retrievers.") or name.split(".")[1] not in FLOOR_OF:
                continue
            room = name.split(".")[1]
            if room != place[0] and FLOOR_OF[room] >= FLOOR_OF[place[0]]:
                wrong.append(f"{'.'.join(place)} imports {name}")
    assert wrong == []
