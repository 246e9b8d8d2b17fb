"""A tool of several arguments: `agent.tools: [search, "calculator:Calculator"]`."""

from agentrl.agent.tools import ToolError


class Calculator:
    name, description = "calculator", "Work out what two numbers make."
    parameters = {
        "type": "object",
        "properties": {"a": {"type": "number"}, "sign": {"enum": ["+", "-", "*", "/"]}, "b": {"type": "number"}},
        "required": ["a", "sign", "b"],
    }

    async def call(self, a: float, sign: str, b: float) -> str:
        if sign == "/" and b == 0:
            raise ToolError("nothing can be divided by 0")
        return f"{ {'+': a + b, '-': a - b, '*': a * b, '/': a / (b or 1)}[sign]:g}"
