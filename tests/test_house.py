"""The tree keeps its floors, and no room grows too crowded to read."""

import ast
from pathlib import Path

TOP = Path(__file__).parents[1]

# From the ground up. A module imports from its own room and from floors below, never from another room of its own floor.
FLOORS = [
    ["retrievers.base", "retrievers.names"],
    ["retrievers.batching", "retrievers.models", "retrievers.secrets"],
    ["retrievers.index", "retrievers.clients"],
    ["retrievers.lucene", "retrievers.dense", "retrievers.stages"],
    ["retrievers.backends"],
    ["retrievers.service"],
    ["agentrl.types"],
    ["agentrl.extras", "agentrl.progress", "agentrl.registry", "agentrl.scores"],
    ["agentrl.advantages"],
    ["agentrl.config"],
    ["agentrl.data", "agentrl.models", "agentrl.quantization", "agentrl.rewards", "agentrl.runs"],
    ["agentrl.adapters", "agentrl.demo", "agentrl.engines"],
    ["agentrl.agent"],
    ["agentrl.plug_ins", "agentrl.rollout"],
    ["agentrl.evaluation"],
    ["agentrl.training"],
    ["agentrl.display", "agentrl.integrations", "agentrl.pocket"],
    ["agentrl.commands"],
    ["agentrl.cli"],
]
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}

MODULES = {
    ".".join(path.relative_to(TOP).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("agentrl", "retrievers")
    for path in sorted((TOP / package).rglob("*.py"))
}
PYTHON = [
    path
    for folder in ("agentrl", "retrievers", "benchmarks", "examples", "tests")
    for path in (TOP / folder).rglob("*.py")
]


def room(module):
    return ".".join(module.split(".")[:2])


def imported(path):
    """The modules of this project that a file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # A name may be a module of a package or what a module defines.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        else:
            continue
        yield from (name for name in names if name in MODULES)


def test_a_module_imports_from_its_own_room_or_from_floors_below():
    wrong = []
    for module, path in MODULES.items():
        if "." not in module:
            continue
        for name in imported(path):
            # The package itself holds the version, or the names that all share.
            if "." in name and room(name) != room(module) and HEIGHT[room(name)] >= HEIGHT[room(module)]:
                wrong.append(f"{module} imports {name}, which is not below it")
    assert wrong == []


def test_every_floor_has_a_module():
    assert set(HEIGHT) == {room(module) for module in MODULES if "." in module}


def test_retrievers_know_nothing_of_agentrl():
    for module, path in MODULES.items():
        if module.startswith("retrievers"):
            assert not [name for name in imported(path) if name.startswith("agentrl")], module


def test_modules_and_functions_can_be_read_at_one_go():
    long = []
    for path in PYTHON:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 450:
            long.append(f"{path.relative_to(TOP)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 80:
                long.append(f"{path.relative_to(TOP)}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert long == []
