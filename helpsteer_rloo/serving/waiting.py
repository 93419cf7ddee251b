"""How long a request is waited for: for its body, and for its answer when the server ends."""

import asyncio

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from helpsteer_rloo.serving.errors import RequestError, refused


class BodyDeadline:
    """An application whose requests are given up (408) if their body has not come within some seconds."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; what is received after its body, which is that the client has left, may take any time."""
        end = asyncio.get_running_loop().time() + self._seconds
        awaited = scope["type"] == "http"

        async def in_time() -> Message:
            nonlocal awaited
            try:
                async with asyncio.timeout_at(end if awaited else None):
                    message = await receive()
            except TimeoutError:
                # Of all exceptions FastAPI lets this one pass where it reads a body.
                raise HTTPException(408, f"The body did not come within {self._seconds:g} s.") from None
            awaited = awaited and message.get("more_body", False)
            return message

        await self._app(scope, in_time, send)


class EndedByServer:
    """An application whose requests are answered (503) where the server ends them, its grace being over."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. Nothing but the server's end cancels one as a whole."""
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            if not begun:
                error = RequestError(503, "The server ends before the answer is there.", code="server_ends")
                await refused(error)(scope, receive, send)
