"""agentrl trains LLM search agents with stratified group-relative policy optimisation."""

__version__ = "0.1.0"
