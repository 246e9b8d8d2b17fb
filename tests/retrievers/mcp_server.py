"""A small MCP server: over stdio, or over streamable HTTP where a port is given."""

import json
import os
import sys
import time

from mcp.server.mcpserver import MCPServer

server = MCPServer("search")


@server.tool(structured_output=False)
def search(query: str, count: int = 3, language: str = "en") -> list[str]:
    """Find passages."""
    if query == "die":
        os._exit(3)
    if query == "bad":
        raise ValueError("no such thing")
    if query == "slow":
        time.sleep(30)
    return [f'"{query}"\n{language} {os.environ.get("TEST_KEY")} {i}' for i in range(count)]


@server.tool()
def lookup(question: str) -> str:
    """Find one passage, as JSON."""
    return json.dumps({"id": "a", "body": question})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run("stdio")
