"""Options of the HTTP server: one frozen record, checked once; the CLI's server flags are derived from its fields."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shardwright.config import check_choice, check_positive, option
from shardwright.errors import ConfigError

API_KEY_VARIABLE = "SHARDWRIGHT_API_KEY"

LogLevel = Literal["critical", "error", "warning", "info", "debug", "trace"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Address, access and limits of one server."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 for all networks of this machine.")
    port: int = option(8000, "Port to listen on; 0 for any free one.")
    api_key: str | None = field(
        default=None,
        repr=False,  # a record may be logged; the key may not
        metadata={"help": f"Key that clients must send as a bearer token; also read from ${API_KEY_VARIABLE}."},
    )
    served_model_name: str | None = option(None, "Name of the model in the API; default: as named on the command line.")
    chat_template: str | None = option(
        None, "File with a Jinja chat template, or the template itself; default: the tokenizer's."
    )
    root_path: str = option("", "Path prefix that a proxy in front of the server takes off.")
    ssl_keyfile: str | None = option(None, "File of the TLS key; together with ssl_certfile.")
    ssl_certfile: str | None = option(None, "File of the TLS certificate; together with ssl_keyfile.")
    uvicorn_log_level: LogLevel = option("warning", "Level of the HTTP server's own log; info logs every request.")
    allowed_origins: str = option(
        "*", "Origins whose web pages may call the API: separated by commas or as a JSON list; * for all."
    )
    max_queued_requests: int = option(
        1024, "Most unfinished completions, running and waiting; more are refused with 503 and Retry-After."
    )
    max_body_bytes: int = option(32 * 2**20, "Largest request body, in bytes; larger ones are refused with 413.")
    drain_timeout_s: float = option(
        30.0, "Seconds that running requests have to finish after SIGTERM or SIGINT, before they are ended."
    )

    def __post_init__(self) -> None:
        check_choice(self, "uvicorn_log_level", ("critical", "error", "warning", "info", "debug", "trace"))
        check_positive(self, "max_queued_requests", "max_body_bytes")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port} but must be from 0 to 65535")
        if not self.drain_timeout_s >= 0:
            raise ConfigError(f"drain_timeout_s is {self.drain_timeout_s} but must be at least 0 seconds")
        if self.root_path and not self.root_path.startswith("/"):
            raise ConfigError(f"root_path is {self.root_path!r} but must begin with a slash: write /{self.root_path}")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ConfigError("TLS needs both ssl_keyfile and ssl_certfile: give the other one too")
        for name in ("ssl_keyfile", "ssl_certfile"):
            if (path := getattr(self, name)) is not None and not Path(path).is_file():
                raise ConfigError(f"{name} is {path!r}, which is no file")

    @property
    def required_key(self) -> str | None:
        """The key that clients must send: the option, else the environment's; None if neither is set."""
        return self.api_key or os.environ.get(API_KEY_VARIABLE) or None

    @property
    def origins(self) -> list[str]:
        """`allowed_origins` as a list. Raises ConfigError if it is a broken JSON list."""
        if not self.allowed_origins.lstrip().startswith("["):
            return [origin for part in self.allowed_origins.split(",") if (origin := part.strip())]
        try:
            return [str(origin) for origin in json.loads(self.allowed_origins)]
        except json.JSONDecodeError as exc:
            raise ConfigError(
                f"allowed_origins is {self.allowed_origins!r}, no JSON list: {exc}; separate origins by commas instead"
            ) from exc

    def read_chat_template(self) -> str | None:
        """The text of `chat_template`, from its file if it names one. Raises ConfigError if that cannot be read."""
        if self.chat_template is None or any(mark in self.chat_template for mark in ("{{", "{%", "\n")):
            return self.chat_template
        try:
            return Path(self.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"chat_template {self.chat_template!r} is no template and cannot be read: {exc}") from exc
