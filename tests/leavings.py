"""What a run leaves in its folder, without the time and memory that it took, so that runs can be compared to the bit."""

import torch

from agentrl.runs import read_trajectories

_MEASURED = ("seconds/", "tokens_per_second/", "memory/")


def left_by(folder):
    """Return everything that a finished run leaves and that a run with the same config must leave again."""
    last = folder.latest_checkpoint()
    state = [torch.load(last / name, weights_only=False) for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")]
    episodes = [
        [(t.id, t.question.id, t.completion_ids, t.adapter_versions, t.reward, t.turns[-1].logprobs) for t in read]
        for read in map(list, map(read_trajectories, sorted((folder.path / "trajectories").iterdir())))
    ]
    return {
        "step": last.name,
        "state": _flat(state),
        "metrics": [{k: v for k, v in line.items() if not k.startswith(_MEASURED)} for line in folder.read_metrics()],
        "episodes": episodes,
        "scores": {path.name: path.read_text() for path in sorted(folder.evaluations.glob("*.json"))},
        "weights": {path.name: path.read_bytes() for path in folder.trained.glob("*.safetensors")},
    }


def _flat(value):
    """Return nested states with tensors and arrays as bytes."""
    if isinstance(value, dict):
        return {key: _flat(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_flat(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    return value.tobytes() if hasattr(value, "tobytes") else value
