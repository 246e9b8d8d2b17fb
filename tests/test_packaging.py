"""What is installed with agentrl itself, what its extras bring, and what a wheel carries."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from agentrl.extras import EXTRAS

TOP = Path(__file__).parents[1]
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
FOLDERS = ("agentrl", "retrievers", "configs", "pocket_policy", "starter")
IMPORTED_AS = {"pyjnius": "jnius", "faiss-cpu": "faiss", "prometheus-client": "prometheus_client"}

# Runs the command line where a package of an extra cannot be imported, as if it were not installed.
CORE_ALONE = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {" ".join(EXTRAS.values()).split()!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def with_core_alone(code, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", CORE_ALONE + code, *map(str, arguments)], capture_output=True, text=True, **options
    )


def command(*arguments, **options):
    return with_core_alone("from agentrl import cli\nsys.argv[0] = 'agentrl'\ncli.main()\n", *arguments, **options)


def test_advantages_are_computed_with_core_alone():
    code = "from agentrl.advantages import compute\nprint(compute([1.0, 0.0], ['q', 'q'], [0, 0]).values)\n"
    done = with_core_alone(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith("[")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["data", "--help"], ["index", "--help"], ["runs", "--help"]], ids=str
)
def test_help_is_given_with_core_alone(arguments):
    done = command(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage" in done.stdout


def test_a_dry_run_prints_the_resolved_config_with_core_alone_and_names_the_extra_for_the_plan():
    done = command("train", "--config", "smollm2.yaml", "--dry-run")
    assert "learning_rate: 1.0e-05" in done.stdout
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: this needs the package \w+, which is not installed: pip install 'agentrl\[train\]'\n", done.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["data", "demo", "--out", "world"], "demo"),
        (["serve-retriever", "--index", "words"], "retrieval"),
        (["rollout", "--show", "episodes.jsonl.zst"], "train"),
        (["runs", "plot", "runs/quickstart"], "train"),
    ],
    ids=str,
)
def test_a_command_without_its_extra_is_one_message(tmp_path, arguments, extra):
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert f"pip install 'agentrl[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_package_of_an_extra_is_known_by_the_name_that_is_imported():
    listed = {extra: {named(line) for line in PROJECT["optional-dependencies"][extra]} for extra in EXTRAS}
    everything = set().union(*listed.values())
    for extra, packages in EXTRAS.items():
        # starlette is fastapi's own, and imported beside it.
        assert set(packages.split()) - {"starlette"} <= listed[extra]
    assert everything == set(" ".join(EXTRAS.values()).split()) - {"starlette"}


def test_only_the_demo_world_imports_what_the_demo_world_needs():
    pattern = re.compile(rf"^\s*(?:import|from) ({'|'.join(EXTRAS['demo'].split())})\b", re.MULTILINE)
    files = [file for folder in ("agentrl", "retrievers", "benchmarks") for file in (TOP / folder).rglob("*.py")]
    found = {file.relative_to(TOP).parts[:2] for file in files if pattern.search(file.read_text(encoding="utf-8"))}
    assert found == {("agentrl", "demo")}


def named(requirement):
    name = re.match(r"[\w.-]+", requirement)[0].lower()
    return IMPORTED_AS.get(name, name)


@pytest.mark.slow
def test_a_wheel_runs_in_an_empty_folder(tmp_path):
    source, installed, empty = tmp_path / "source", tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    source.mkdir()
    # A copy, because setuptools leaves a build folder behind.
    for name in (*FOLDERS, "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (source / name).symlink_to(TOP / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    build = [*pip, "wheel", str(source), "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run(build, check=True, env=bare)
    [wheel] = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(installed), str(wheel)], check=True, env=bare)
    assert (installed / "agentrl/pocket_policy/model.safetensors").is_file()
    done = subprocess.run(
        [installed / "bin" / "agentrl", "train", "--config", "smollm2.yaml", "--dry-run"],
        cwd=empty,
        env=bare | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert f"adapter: {installed}/agentrl/starter\n" in done.stdout, done.stderr
    # Nothing is here to train on; that is all that stops it.
    assert done.stderr.startswith("error: "), done.stderr
    assert str(empty / "data") in done.stderr
