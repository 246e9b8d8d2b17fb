"""What a user sees of a run: live while it goes on, and as tables and a picture when it has ended."""

from agentrl.display.live import RunDisplay, strata_shares
from agentrl.display.scores import evaluation_table

__all__ = ["RunDisplay", "evaluation_table", "strata_shares"]
