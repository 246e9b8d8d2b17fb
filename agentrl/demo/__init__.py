"""The demo world: passages and questions about real countries and cities."""
