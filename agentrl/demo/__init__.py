"""The demo world: passages and questions about real countries and cities. It needs the extra `agentrl[demo]`."""
