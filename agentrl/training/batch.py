"""A batch of trajectories as tensors, and as the minibatches and sequences that an update takes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from agentrl.training.scoring import Pack, TokenSequence
from agentrl.types import Trajectory


@dataclass(frozen=True, slots=True)
class Updates:
    """How often a batch is trained on.

    Attributes:
        group_size: the episodes of a group, which stay together.
        epochs: passes over a batch.
        minibatches: parts of a batch, with an update for each.
        seed: of the order in which groups are dealt.
    """

    group_size: int
    epochs: int = 1
    minibatches: int = 1
    seed: int = 0

    @property
    def per_batch(self) -> int:
        return self.epochs * self.minibatches


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


@dataclass(frozen=True, slots=True, eq=False)
class Minibatch:
    """What one update trains on, on the CPU.

    Attributes:
        tensors: those of `batch_tensors`, `advantages` [n] or [n, C], and what scoring adds, of n episodes.
        runs: bool [n], the episodes that the model has to run for; the others have no gradient, and count in normalisers
            alone.
    """

    tensors: dict[str, torch.Tensor]
    runs: torch.Tensor

    @property
    def own(self) -> torch.Tensor:
        """Bool [n, C], true at the tokens that are trained."""
        return self.tensors["tool_mask"].bool()

    def sequences(self) -> list[TokenSequence]:
        """The episodes without padding, with their own tokens to be scored; those that do not run have none."""
        tensors, made = self.tensors, []
        for row, runs in enumerate(self.runs.tolist()):
            prompt = tensors["prompt_ids"][row][tensors["prompt_mask"][row].bool()]
            completion = tensors["completion_ids"][row][tensors["completion_mask"][row].bool()]
            scored = torch.nonzero(tensors["tool_mask"][row]).squeeze(1) + len(prompt)
            made.append(TokenSequence(torch.cat([prompt, completion]).numpy(), scored[: None if runs else 0].numpy()))
        return made

    def some(self, rows: torch.Tensor) -> Minibatch:
        """Return the episodes of these numbers [k] alone, which get the numbers 0 to k - 1."""
        return Minibatch({name: tensor[rows] for name, tensor in self.tensors.items()}, self.runs[rows])

    def places(self, sequences: Sequence[TokenSequence], pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """Return for the scored tokens [S] of a pack of `sequences` which member each belongs to, and where in the completion."""
        prompts = self.tensors["prompt_mask"].sum(1).tolist()
        columns = [torch.from_numpy(sequences[row].scored) - prompts[row] for row in pack.members]
        counts = torch.tensor([len(some) for some in columns])
        return torch.repeat_interleave(torch.arange(len(columns)), counts), torch.cat(columns)

    def rows(self, members: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
        """Return the tensors of some episodes, as wide as these need, on a device."""
        chosen = torch.tensor(members)
        width = int(self.tensors["completion_mask"][chosen].sum(1).max())
        return {
            name: tensor[chosen, :width].to(device)
            if tensor.dim() == 2 and not name.startswith("prompt")
            else tensor[chosen].to(device)
            for name, tensor in self.tensors.items()
        }


def deal(batch: Minibatch, group_size: int, minibatches: int, generator: torch.Generator | None) -> Iterator[Minibatch]:
    """Deal the episodes of a batch into minibatches of whole groups, in an order that is drawn, or as they stand.

    Where groups cannot be dealt evenly, some minibatches have one more than others.
    """
    groups = len(batch.runs) // group_size
    order = torch.arange(groups) if generator is None else torch.randperm(groups, generator=generator)
    for some in torch.tensor_split(order, minibatches):
        rows = (some[:, None] * group_size + torch.arange(group_size)).flatten()
        yield batch.some(rows)
