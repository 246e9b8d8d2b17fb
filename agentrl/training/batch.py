"""A batch of trajectories as the tensors that TRL takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from agentrl.types import Trajectory


def batch_tensors(
    trajectories: Sequence[Trajectory], pad_id: int, trained: Sequence[bool] | None = None
) -> dict[str, torch.Tensor]:
    """Lay trajectories out as TRL expects: prompts padded left, completions right.

    Returns prompt_ids and prompt_mask [B, P]; completion_ids, completion_mask, tool_mask, sampling_per_token_logps and
    turn_index (0 at padding) [B, C]. tool_mask is 1 at the model's own tokens, and 0 at the environment's, at padding and
    all over an episode whose environment failed or that `trained` [B] leaves out; None leaves out no other. An episode
    without a token, whose environment failed in its first turn, is one padding token that no mask counts as trained.

    Raises:
        ValueError: if `trained` has not one entry for each trajectory.
    """
    width = max(1, max(len(t.completion_ids) for t in trajectories))
    prompt_width = max(len(t.prompt_ids) for t in trajectories)
    size = len(trajectories)
    out = {
        "prompt_ids": torch.full((size, prompt_width), pad_id),
        "prompt_mask": torch.zeros((size, prompt_width), dtype=torch.long),
        "completion_ids": torch.full((size, width), pad_id),
        "completion_mask": torch.zeros((size, width), dtype=torch.long),
        "tool_mask": torch.zeros((size, width), dtype=torch.long),
        "turn_index": torch.zeros((size, width), dtype=torch.long),
        "sampling_per_token_logps": torch.zeros((size, width)),
    }
    chosen = [True] * size if trained is None else trained
    for row, (trajectory, is_trained) in enumerate(zip(trajectories, chosen, strict=True)):
        prompt, completion = trajectory.prompt_ids, trajectory.completion_ids
        out["prompt_ids"][row, prompt_width - len(prompt) :] = torch.tensor(prompt)
        out["prompt_mask"][row, prompt_width - len(prompt) :] = 1
        out["completion_mask"][row, : max(1, len(completion))] = 1
        if completion:
            out["completion_ids"][row, : len(completion)] = torch.tensor(completion)
            if trajectory.valid and is_trained:
                out["tool_mask"][row, : len(completion)] = torch.tensor(trajectory.action_mask, dtype=torch.long)
            out["turn_index"][row, : len(completion)] = torch.tensor(trajectory.turn_index)
            out["sampling_per_token_logps"][row, : len(completion)] = torch.tensor(trajectory.logprobs)
    return out


def spread_over_tokens(
    advantages: torch.Tensor, turn_index: torch.Tensor, completion_mask: torch.Tensor
) -> torch.Tensor:
    """Give each token the advantage of its turn: [B, T] for T turns and turn_index [B, C] make [B, C], 0 at padding.

    Turns beyond T are those of episodes that are not trained on, and get 0.
    """
    missing = int(turn_index.max()) + 1 - advantages.shape[1]
    padded = torch.nn.functional.pad(advantages, (0, max(0, missing)))
    return padded.gather(1, turn_index) * completion_mask
