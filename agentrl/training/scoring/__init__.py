"""Scoring: sequences in, log-probabilities and entropies at their scored tokens out, with gradients; no algorithm."""

from agentrl.training.scoring.scorer import Packing, Scorer, Scores, ScoringError
from agentrl.training.scoring.tree import Pack, TokenSequence, pack

__all__ = ["Pack", "Packing", "Scorer", "Scores", "ScoringError", "TokenSequence", "pack"]
