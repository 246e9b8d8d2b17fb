"""The errors that readers and writers of data raise."""

from agentrl.types import AgentRLError


class DataError(AgentRLError):
    """Data that cannot be read or written; the message names the file, and the line where there is one."""


class RowError(DataError):
    """A row that gives no question; the message names the row's column and what to do, and the reader adds file and line."""
