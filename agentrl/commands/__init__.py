"""What the commands that only run a policy do: evaluate it, sample episodes with it, and show them."""
