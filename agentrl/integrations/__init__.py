"""agentrl's advantages in other people's trainers."""

ESTIMATORS_OF_ROLLOUTS = ("stratified", "grpo", "dr_grpo", "rloo", "reinforce_pp", "opo")
"""The estimators that need rewards, groups, strata and lengths alone. Other trainers hand on no turns, and keep no past."""
