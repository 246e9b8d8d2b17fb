"""Where tests find real questions, passages and judgements: the folder that $AGENTRL_TEST_DATA names."""

import os
from pathlib import Path

import pytest

NOT_CHECKED = "not checked: "


def real_data(path):
    """Return `path` under that folder, or skip the test and say what is missing."""
    folder = os.environ.get("AGENTRL_TEST_DATA")
    if folder is None:
        pytest.skip(f"{NOT_CHECKED}needs {path}; set AGENTRL_TEST_DATA to a folder that has it")
    found = Path(folder) / path
    if not found.exists():
        pytest.skip(f"{NOT_CHECKED}{found} is not there, which AGENTRL_TEST_DATA should have")
    return found
