"""Packages that stand in for wandb, mlflow and trackio: they have what transformers and TRL call, and record it in `calls`."""

WANDB = """
from types import SimpleNamespace

calls = []
failing = False
run = None
mode = "online"
config = {}


class _Config(dict):
    def update(self, values, allow_val_change=False):
        dict.update(self, values)
        calls.append(("config", dict(values)))


def Settings(**options):
    return options


def setup():
    return SimpleNamespace(settings=SimpleNamespace(mode=mode, base_url="http://127.0.0.1:9"))


def init(**options):
    global run, config
    calls.append(("init", options))
    run = SimpleNamespace(_label=lambda **_: None, summary={}, id=options["id"], url=None)
    config = _Config()


def define_metric(*names, **options):
    pass


def log(values):
    if failing:
        raise ConnectionError("the host is gone\\nand more")
    calls.append(("log", values))


def Table(columns, data):
    return [dict(zip(columns, row)) for row in data]


def finish():
    global run
    calls.append(("finish",))
    run = None
"""

MLFLOW = """
from types import SimpleNamespace

from mlflow import utils

__version__ = "3.17.2"
calls = []
runs = {}
active = None
uri = None


def is_tracking_uri_set():
    return uri is not None


def set_tracking_uri(given):
    global uri
    uri = given


def get_tracking_uri():
    return uri


def set_experiment(name):
    calls.append(("experiment", name))


def start_run(run_id=None, run_name=None):
    global active
    active = runs.setdefault(
        run_id or "made", SimpleNamespace(info=SimpleNamespace(run_id="made"), data=SimpleNamespace(params={}))
    )
    calls.append(("start", run_id, run_name))
    return active


def active_run():
    return active


def log_params(values, synchronous):
    assert not values.keys() & active.data.params.keys(), "a parameter has one value for ever"
    active.data.params.update(values)


def log_metrics(metrics, step):
    calls.append(("log", step, metrics))


def log_table(data, artifact_file):
    calls.append(("table", artifact_file, data))


def flush_async_logging():
    calls.append(("flush",))


def end_run():
    global active
    calls.append(("end",))
    active = None
"""

TRACKIO = """
from types import SimpleNamespace

__version__ = "0.43.0"
calls = []
nothing = SimpleNamespace(get=lambda: None)
context_vars = SimpleNamespace(current_run=nothing, current_space_id=nothing)


class _Config(dict):
    def update(self, values, allow_val_change=False):
        dict.update(self, values)
        calls.append(("config", dict(values)))


config = _Config()


def init(**options):
    calls.append(("init", options))


def log(values):
    calls.append(("log", values))


def Table(dataframe):
    return dataframe.to_dict("records")


def finish():
    calls.append(("finish",))
"""

FILES = {
    "wandb/__init__.py": WANDB,
    "wandb/sdk/__init__.py": "",
    "wandb/sdk/lib/__init__.py": "",
    "wandb/sdk/lib/config_util.py": "class ConfigError(Exception): ...\n",
    "mlflow/__init__.py": MLFLOW,
    "mlflow/utils/__init__.py": "from mlflow.utils import validation\n",
    "mlflow/utils/validation.py": "MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH = 6000, 100\n",
    "trackio.py": TRACKIO,
}


def write_packages(folder):
    """Write the packages into a folder, from which they can be imported."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
