"""The API key: everything but the open paths asks for it as a bearer token."""

from __future__ import annotations

import secrets

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from shardwright.server.errors import APIError, error_response

OPEN_PATHS = frozenset({"/", "/health", "/metrics", "/status", "/version"})
"""What people, load balancers and monitoring read without a key."""


class RequireKey:
    """ASGI middleware that answers 401 unless the request carries the key.

    Args:
        app: the guarded application.
        key: what clients must send as `Authorization: Bearer <key>`.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self.key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope) or self._has_key(scope):
            return await self.app(scope, receive, send)
        error = APIError(
            "the API key is missing or wrong: send it as the header Authorization: Bearer KEY",
            status=401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error_response(error)(scope, receive, send)

    @staticmethod
    def _is_open(scope: Scope) -> bool:
        return scope["path"].removeprefix(scope.get("root_path", "")) in OPEN_PATHS

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(given.strip().encode(), self.key)
