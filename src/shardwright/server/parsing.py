"""From a request's body to a checked record, or an error that names the field at fault."""

from __future__ import annotations

import difflib
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from shardwright.server.errors import APIError

Body = TypeVar("Body", bound=BaseModel)

JSON_TYPES = ("application/json", "+json")


async def read_body(request: Request, schema: type[Body], *, max_bytes: int) -> Body:
    """Read and check a JSON body.

    Raises: APIError 400 if it is no JSON or does not fit the schema, 413 if it is too large, 415 if it claims to be
        something else.
    """
    content_type = request.headers.get("content-type", JSON_TYPES[0]).partition(";")[0].strip().lower()
    if not content_type.endswith(JSON_TYPES):
        raise APIError(
            f"the body is {content_type}: send JSON, with the header Content-Type: application/json", status=415
        )
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise APIError(f"the body is larger than {max_bytes} bytes, the most this server takes", status=413)
    try:
        return schema.model_validate_json(bytes(body))
    except ValidationError as exc:
        raise explain(exc.errors(include_url=False)[0], schema) from exc


def explain(error: ErrorDetails, schema: type[BaseModel]) -> APIError:
    """The first thing that pydantic found wrong, in the API's words."""
    param = field_path(error["loc"])
    match error["type"]:
        case "json_invalid":
            return APIError(f"the body is not valid JSON in UTF-8: {error['ctx']['error']}", code="invalid_json")
        case "model_type":
            where = param or "the body"
            return APIError(f"{where} must be a JSON object, got {shown(error['input'])}", param=param or None)
        case "missing":
            return APIError(f"{param} is missing", param=param, code="missing_required_parameter")
        case "extra_forbidden":
            near = difflib.get_close_matches(str(error["loc"][-1]), known_fields(schema), n=1)
            hint = f": did you mean {near[0]}?" if near and len(error["loc"]) == 1 else ""
            return APIError(f"unknown parameter {param}{hint}", param=param, code="unknown_parameter")
        case "refused":
            return APIError(f"{param} {error['msg']}", param=param, code="unsupported_parameter")
        case "expected":
            return APIError(f"{param} {error['msg']}, got {shown(error['input'])}", param=param)
        case _:
            rule = error["msg"].replace("Input should", "it should")
            return APIError(f"{param} is {shown(error['input'])}: {rule}", param=param)


def known_fields(schema: type[BaseModel]) -> list[str]:
    """Names a client may have meant: all but those that are known only to be refused or ignored."""
    return [name for name, field in schema.model_fields.items() if not field.exclude]


def field_path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content` from ("messages", 0, "content")."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path.removesuffix(".[key]")


def shown(value: object) -> str:
    """A value as an error message shows it: short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
