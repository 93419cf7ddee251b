"""What a request that is not answered comes to, in the form of OpenAI's errors."""

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

_HEADERS = {408: {"Connection": "close"}, 429: {"Retry-After": "1"}}
"""Of answers by their status. After one to half a request there can be no other on its connection."""


class RequestError(Exception):
    """A request that is not answered: HTTP status, message, the parameter it is about, and a code."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def add_error_handlers(app: FastAPI) -> None:
    """Let every error of an application be answered in the one form."""
    app.exception_handler(RequestError)(_on_request_error)
    app.exception_handler(RequestValidationError)(_on_invalid)
    app.exception_handler(HTTPException)(_on_http)
    app.exception_handler(Exception)(_on_failure)


def refused(error: RequestError) -> JSONResponse:
    """The answer to such a request."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    content = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return JSONResponse({"error": content}, error.status, _HEADERS.get(error.status))


async def _on_request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return refused(error)


async def _on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:])
    message = f"{place}: {first['msg']}" if place else str(first["msg"])
    return refused(RequestError(400, message, param=place or None))


async def _on_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refused(RequestError(error.status_code, str(error.detail)))


async def _on_failure(_: Request, error: Exception) -> Response:
    return refused(RequestError(500, f"Scoring failed ({type(error).__name__}); the server's log says more."))
