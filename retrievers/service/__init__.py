"""Retrieval served over HTTP, and in a child process."""
