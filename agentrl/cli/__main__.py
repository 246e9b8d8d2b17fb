"""`python -m agentrl.cli` is what `agentrl` is."""

from agentrl.cli import main

main()
