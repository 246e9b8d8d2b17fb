"""A run is a folder. This room names its files, writes them and reads them back; nothing else about a run is kept.

config.yaml          the resolved configuration
versions.json        of Python, agentrl and the packages below it
inputs.json          what tells the contents of its questions, index and adapter apart
start.json           its latest start: when, where, after which step, with which settings changed
roll_backs.json      when and why it went back to an older checkpoint, if it did
ending.json          after which step training ended and why, and which step's weights it left, once it has
logger_ids.json      by which id Weights & Biases and MLflow know it, if they do
metrics.jsonl        one object a step
trajectories/        step-00001.jsonl.zst …, one trajectory a line
evaluations/         step-00000.json …, after.json, ceiling.json, and the trajectories behind each
checkpoints/         checkpoint-N of TRL, to resume from: the newest ones, and the best that was evaluated
adapter/             the PEFT adapter that training left, or
model/               the model, if all its weights were trained
learning.png         reward, evaluations and strata by step, drawn from the above
tensorboard/, wandb/, mlflow/   what loggers keep on this disk
logs/                what each process printed
error.txt            the traceback, if its latest start failed
.lock                held by the process that has the run open
.trainer.lock        held by its trainer's process
"""

from agentrl.runs.checkpoints import checkpoint_step, new_checkpoint
from agentrl.runs.files import RunError
from agentrl.runs.folder import RunFolder, versions
from agentrl.runs.trajectories import append_trajectories, read_trajectories, write_trajectories

__all__ = [
    "RunError",
    "RunFolder",
    "append_trajectories",
    "checkpoint_step",
    "new_checkpoint",
    "read_trajectories",
    "versions",
    "write_trajectories",
]
