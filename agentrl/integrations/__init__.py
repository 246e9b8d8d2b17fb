"""agentrl's advantages in other people's trainers."""
