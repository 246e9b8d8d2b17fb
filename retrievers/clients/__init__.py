"""Retrievers that ask somebody else: HTTP servers, web APIs, MCP tools."""
