"""The error that every reader and writer of data raises."""

from agentrl.types import AgentRLError


class DataError(AgentRLError):
    """Data that cannot be read or written; the message names the file, and the line where there is one."""
