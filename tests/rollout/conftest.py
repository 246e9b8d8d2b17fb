"""One Ray for the tests of this folder, whose processes can import its modules."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def started_ray():
    import ray

    here = Path(__file__).parent
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": f"{here}:{here.parent}"}},
    )
    yield
    ray.shutdown()
