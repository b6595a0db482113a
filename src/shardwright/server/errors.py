"""Errors as OpenAI's body: `{"error": {"message", "type", "param", "code"}}`, in this one place.

UsageError, RequestError          400  invalid_request_error
PromptTooLongError                400  context_length_exceeded
wrong or missing key              401  invalid_api_key
unknown model, unknown route      404  model_not_found, not_found
EngineBusyError                   503  with Retry-After
other EngineError, anything else  500  server_error
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from shardwright.errors import EngineBusyError, EngineDeadError, PromptTooLongError, ShardwrightError, UsageError

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1
"""How long a refused client is asked to wait, unless the error knows better."""


class APIError(ShardwrightError):
    """An error of the HTTP interface itself, with its status."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong, for people (`message`) and for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every error response."""

    error: ErrorDetail


def to_api_error(exc: Exception) -> APIError:
    """The HTTP form of any error; one that nobody foresaw keeps its text to the log."""
    param = getattr(exc, "param", None)
    match exc:
        case APIError():
            return exc
        case PromptTooLongError():
            return APIError(str(exc), param=param, code="context_length_exceeded")
        case UsageError():
            return APIError(str(exc), param=param)
        case EngineBusyError():
            return APIError(str(exc), status=503, code="busy", headers={"Retry-After": str(RETRY_AFTER_S)})
        case EngineDeadError():
            return APIError(str(exc), status=500, code="engine_dead")
        case ShardwrightError():
            return APIError(str(exc), status=500)
        case _:
            return APIError("the server failed on this request; its log says why", status=500)


def error_json(exc: Exception) -> bytes:
    """OpenAI's error body."""
    error = to_api_error(exc)
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return msgspec.json.encode(
        ErrorBody(ErrorDetail(message=str(error), type=kind, param=error.param, code=error.code))
    )


def error_response(exc: Exception) -> Response:
    """The response to a request that ended with an error."""
    error = to_api_error(exc)
    return Response(error_json(error), error.status, error.headers, media_type="application/json")


def add_error_handlers(app: FastAPI) -> None:
    """Make every error of the app, routing included, an OpenAI error body."""

    async def of_shardwright(request: Request, exc: Exception) -> Response:
        error = to_api_error(exc)
        if error.status == 500:
            logger.error("%s %s: %s", request.method, request.url.path, exc)
        return error_response(error)

    async def of_routing(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        message, code = f"{request.method} {request.url.path}: {exc.detail}", None
        if exc.status_code == 404:
            message, code = (
                f"there is no {request.url.path} here: see {request.scope['root_path']}/openapi.json",
                "not_found",
            )
        elif exc.status_code == 405:
            allowed = (exc.headers or {}).get("Allow", "another method")
            message, code = f"{request.url.path} takes {allowed}, not {request.method}", "method_not_allowed"
        return error_response(APIError(message, status=exc.status_code, code=code, headers=exc.headers))

    async def of_disconnect(request: Request, exc: Exception) -> Response:
        return Response(status_code=499)  # as nginx logs it; nobody is there to read it

    async def of_the_unforeseen(request: Request, exc: Exception) -> Response:
        return error_response(exc)  # Starlette logs the traceback

    app.add_exception_handler(ShardwrightError, of_shardwright)
    app.add_exception_handler(HTTPException, of_routing)
    app.add_exception_handler(ClientDisconnect, of_disconnect)
    app.add_exception_handler(Exception, of_the_unforeseen)
