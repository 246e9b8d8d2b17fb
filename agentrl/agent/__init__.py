"""The agent: how it is asked, how its actions are read, and the loop that runs one episode."""
