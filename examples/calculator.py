"""A tool of several arguments: `agent.tools: [search, "calculator:Calculator"]`."""

from operator import add, mul, sub, truediv

from agentrl.agent.tools import ToolError


class Calculator:
    name, description = "calculator", "Work out what two numbers make."
    signs, number = {"+": add, "-": sub, "*": mul, "/": truediv}, {"type": "number"}
    properties = {"a": number, "sign": {"enum": list(signs)}, "b": number}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}

    async def call(self, a: float, sign: str, b: float) -> str:
        try:
            return f"{self.signs[sign](a, b):g}"
        except (ZeroDivisionError, OverflowError) as error:
            raise ToolError(str(error)) from error
