"""agentrl's advantages as verl's own trainer computes them, in a process that has verl.

verl and what it imports here are no requirement of agentrl's. To run this, collect their wheels in a folder,

    pip download --no-deps --dest DIR verl==0.9.1 tensordict==0.10.0 hydra-core omegaconf antlr4-python3-runtime==4.9.3 \
        codetiming torchdata pyvers orjson cloudpickle importlib_metadata

and name it in $AGENTRL_VERL_WHEELS.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from real_data import NOT_CHECKED

from agentrl.advantages import compute
from agentrl.integrations import ESTIMATORS_OF_ROLLOUTS

TOP = Path(__file__).parents[2]
# What the first column of the page's table names of verl's configuration.
ROWS = [line for line in (TOP / "docs" / "from_verl.md").read_text().splitlines() if line.startswith("| `")]
SETTINGS = [name for row in ROWS for name in re.findall(r"`(\w+\.[\w.]+)", row.split(" | ")[0])]
IN_SEARCH_R1 = {"data.max_obs_length"}

# Ten rollouts of two prompts, and two rows of padding; the model's tokens are 1, observations and padding 0.
MASKS = [
    "111000000000",
    "110011000000",
    "110011001100",
    "110001110000",
    "111110000000",
    "110111101000",
    "110011101100",
    "111111000000",
    "010110000000",
    "110110000000",
    "000000000000",
    "000000000000",
]
SEARCHES = [0, 1, 2, 1, 0, 2, 2, 0, 1, 1]
REWARDS = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.25, 0.0]
PROMPTS = ["b", "b", "b", "b", "a", "a", "a", "a", "a", "b"]
REAL = len(SEARCHES)


def last_position(mask):
    return mask.rindex("1") if "1" in mask else 0


def batch():
    rewards = np.zeros((len(MASKS), len(MASKS[0])))
    for row, reward in enumerate(REWARDS):
        rewards[row, last_position(MASKS[row])] = reward
    return {
        "rewards": rewards.tolist(),
        "mask": [[int(token) for token in mask] for mask in MASKS],
        "uid": [*PROMPTS, "pad", "pad"],
    }


ASKED = {
    "verl's own": ["algorithm.adv_estimator=grpo"],
    **{name: [f"algorithm.adv_estimator=agentrl_{name}"] for name in ESTIMATORS_OF_ROLLOUTS},
    "options": [
        "algorithm.adv_estimator=agentrl_stratified",
        "+algorithm.agentrl.alpha=0.6",
        "+algorithm.agentrl.degenerate=global",
        "+algorithm.agentrl.group_size=5",
    ],
    "lengths as strata": [
        "algorithm.adv_estimator=agentrl_stratified",
        "+algorithm.agentrl.strata='mask_strata:length_parity'",
    ],
    "no keys": ["algorithm.adv_estimator=agentrl_stratified", "+algorithm.agentrl.strata='mask_strata:nothing'"],
    "unknown strata": ["algorithm.adv_estimator=agentrl_stratified", "+algorithm.agentrl.strata=observation"],
    "wrong group size": ["algorithm.adv_estimator=agentrl_stratified", "+algorithm.agentrl.group_size=4"],
    "rejected tokens": [
        "algorithm.adv_estimator=agentrl_stratified",
        "algorithm.rollout_correction.rollout_rs=seq_mean_k1",
    ],
    "rejected later": [
        "algorithm.adv_estimator=agentrl_stratified",
        "algorithm.rollout_correction.rollout_rs=seq_mean_k1",
        "algorithm.rollout_correction.bypass_mode=true",
    ],
}

MASK_STRATA = """
def length_parity(mask):
    return (mask.sum(1) % 2).tolist()

def nothing(mask):
    return []
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    wheels = os.environ.get("AGENTRL_VERL_WHEELS")
    if not wheels:
        pytest.skip(
            f"{NOT_CHECKED}needs verl; set AGENTRL_VERL_WHEELS to the folder of wheels that this file describes"
        )
    folder = tmp_path_factory.mktemp("verl")
    installed, plugged = folder / "installed", folder / "plugged"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--no-index", "--no-build-isolation", "--target", str(installed)]
    subprocess.run([*pip, *map(str, sorted(Path(wheels).iterdir()))], check=True)
    # What installing agentrl tells of its plug-ins, said for the agentrl that is tested.
    plugins = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["entry-points"]["verl.plugins"]
    info = plugged / "agentrl-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: agentrl\nVersion: 0\n")
    lines = [f"{name} = {module}" for name, module in plugins.items()]
    (info / "entry_points.txt").write_text("\n".join(["[verl.plugins]", *lines, ""]))
    (plugged / "mask_strata.py").write_text(MASK_STRATA)
    # The environment's own packages come before those beside verl.
    program = Path(__file__).with_name("verl_process.py")
    start = f"import runpy, sys; sys.path.append({str(installed)!r}); runpy.run_path({str(program)!r})"
    done = subprocess.run(
        [sys.executable, "-c", start],
        input=json.dumps({"batch": batch(), "overrides": list(ASKED.values()), "settings": SETTINGS}),
        env=os.environ | {"PYTHONPATH": f"{plugged}:{TOP}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return found["registered"], dict(zip(ASKED, found["answers"], strict=True)), found["settings"]


def expected(estimator, strata=SEARCHES, **options):
    """The advantages [n, T] that `compute` gives for the same rollouts."""
    lengths = [mask.count("1") for mask in MASKS[:REAL]]
    rewards = torch.tensor(REWARDS)
    values = compute(rewards, PROMPTS, strata, estimator, lengths=lengths, **options).values.tolist()
    return [[value * int(token) for token in mask] for value, mask in zip([*values, 0.0, 0.0], MASKS, strict=True)]


@pytest.mark.slow
def test_verl_finds_the_estimators_without_being_told(answers):
    assert {f"agentrl_{name}" for name in ESTIMATORS_OF_ROLLOUTS} <= set(answers[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATORS_OF_ROLLOUTS)
def test_verls_trainer_computes_what_compute_does(answers, name):
    assert answers[1][name] == expected(name)


@pytest.mark.slow
def test_grpo_with_sample_deviations_is_verls_own(answers):
    torch.testing.assert_close(torch.tensor(answers[1]["verl's own"]), torch.tensor(expected("grpo", ddof=1)))


@pytest.mark.slow
def test_options_come_from_verls_config(answers):
    assert answers[1]["options"] == expected("stratified", alpha=0.6, degenerate="global", group_size=5)
    assert answers[1]["options"] != answers[1]["stratified"]


@pytest.mark.slow
def test_strata_can_be_a_function_of_the_response_mask(answers):
    parity = [mask.count("1") % 2 for mask in MASKS[:REAL]]
    assert answers[1]["lengths as strata"] == expected("stratified", strata=parity)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no keys", "algorithm.agentrl.strata must give 10 keys, one for each row, got 0"),
        ("unknown strata", "unknown strata 'observation' .* did you mean observations"),
        ("wrong group size", "group 'b' has 5 rollouts instead of 4"),
        ("rejected tokens", "rollout_rs takes tokens out of the response mask"),
    ],
)
def test_what_cannot_be_stratified_is_an_error(answers, case, message):
    assert re.search(f"AdvantageError: .*{message}", answers[1][case])


@pytest.mark.slow
def test_tokens_that_verl_rejects_after_the_advantages_do_no_harm(answers):
    assert answers[1]["rejected later"] == expected("stratified")


@pytest.mark.slow
def test_verls_settings_of_the_page_are_there(answers):
    assert len(answers[2]) > 15
    assert {name for name, is_there in answers[2].items() if not is_there} == IN_SEARCH_R1
