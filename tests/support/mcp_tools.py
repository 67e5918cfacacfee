"""An MCP server with good tools and bad ones, over its standard streams or HTTP, and rewards for what is done with it.

python -m tests.support.mcp_tools [PORT]
"""

import asyncio
import base64
import os
import subprocess
import sys
from typing import Annotated, Any


def note(what):
    """Append a line with the id of this process to the file MCP_LOG."""
    if path := os.environ.get("MCP_LOG"):
        with open(path, "a") as file:
            file.write(f"{what} {os.getpid()}\n")


def server():
    """Return the server, with its tools."""
    from mcp.server.mcpserver import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError
    from mcp_types import EmbeddedResource, ImageContent, ResourceLink, TextContent, TextResourceContents
    from pydantic import Field

    subject = MCPServer("tools", log_level="ERROR")
    counted = []

    @subject.tool()
    def add(a: int, b: Annotated[int, Field(ge=0, description="No less than zero.")] = 1) -> int:
        """Add two numbers."""
        return a + b

    @subject.tool()
    def count() -> str:
        """Count its calls."""
        counted.append(1)
        return str(len(counted))

    @subject.tool()
    def look(n: int) -> str:
        """Look at something, as the policy of ``tool_model`` does."""
        return f"{n} is seen"

    @subject.tool()
    def odd(function: str, name: str = "", self_: dict[str, Any] | None = None) -> str:
        """Take arguments whose names are those of Python's own."""
        return f"{function} {name}"

    @subject.tool()
    def fail(why: str) -> str:
        """Fail."""
        raise ToolError(why)

    @subject.tool()
    async def hang() -> str:
        """Hang."""
        await asyncio.sleep(3600)
        return ""

    @subject.tool()
    def crash() -> str:
        """End the process."""
        os._exit(7)

    @subject.tool(structured_output=False)  # The SDK takes time with the square of what comes over a pipe.
    def large() -> str:
        """Return 10 MB."""
        return "x" * 10_000_000

    @subject.tool(structured_output=False)
    def mixed() -> list:
        """Return all kinds of content."""
        data = base64.b64encode(b"\xff\xd8").decode()
        return [
            TextContent(text="a<|im_end|>"),
            ImageContent(data=data, mime_type="image/png"),
            ResourceLink(name="log", uri="file:///log.txt"),
            EmbeddedResource(resource=TextResourceContents(uri="file:///a.txt", text="inside")),
        ]

    @subject.tool(structured_output=False)
    def nothing() -> list:
        """Return no content."""
        return []

    @subject.tool()
    def leave() -> str:
        """Leave a process behind, in a group of its own."""
        left = subprocess.Popen(["sleep", "3600"], start_new_session=True)
        return str(left.pid)

    return subject


class Stubborn:
    """Starts, and then heeds neither the end of its input nor a request to end."""

    @staticmethod
    def serve():
        import signal
        import time

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)


def worth(task, answer, calls):
    """Return the share of calls that were answered, and the answer's length."""
    answered = sum("content" in call for call in calls)
    return {"reward": answered / max(1, len(calls)), "letters": len(answer or ""), "row": task.row}


async def said(messages):
    """Return how many messages there were."""
    await asyncio.sleep(0)
    return len(messages)


if __name__ == "__main__":
    note("start")
    if "MCP_STUBBORN" in os.environ:
        Stubborn.serve()
    elif len(sys.argv) > 1:
        server().run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server().run("stdio")
