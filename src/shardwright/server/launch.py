"""The server process: socket first, then the engine, then requests, and an orderly end."""

from __future__ import annotations

import errno
import logging
import signal
import socket
import ssl
from types import FrameType

import uvicorn

from shardwright.config import EngineConfig
from shardwright.errors import ConfigError
from shardwright.server.app import build_app
from shardwright.server.config import ServerConfig
from shardwright.server.engine import ServedEngine
from shardwright.server.lifecycle import Lifecycle, State

logger = logging.getLogger(__name__)

BACKLOG = 2048
LAST_WORDS_S = 3
"""How long requests that are ended at shutdown have to send their errors."""


def serve(engine_config: EngineConfig, server_config: ServerConfig) -> int:
    """Serve a model until SIGTERM or SIGINT.

    The first signal drains: new requests are refused, running ones may finish within `drain_timeout_s`. A second one
    stops at once, and so does a signal while the model loads.

    Returns: the exit code.
    Raises: ConfigError if the address is taken, before the model is loaded; what the engine raises if it cannot start.
    """
    server_config.read_chat_template()
    check_certificate(server_config)
    with bind(server_config.host, server_config.port) as sock:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # until uvicorn takes over
        try:
            from shardwright.async_llm import AsyncLLM  # imports torch: a taken port should be told before

            engine = AsyncLLM.from_config(engine_config)
            try:
                run(engine, server_config, sock)
            finally:
                engine.close()
        except KeyboardInterrupt:
            logger.info("stopped")
    return 0


def check_certificate(config: ServerConfig) -> None:
    """Raise ConfigError if the TLS files cannot be used, before uvicorn finds out."""
    if config.ssl_certfile is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password="")
    except OSError as exc:  # SSLError is one
        raise ConfigError(
            f"ssl_certfile {config.ssl_certfile!r} and ssl_keyfile {config.ssl_keyfile!r} are no certificate and "
            f"unencrypted key in PEM format: {exc}"
        ) from exc


def run(engine: ServedEngine, config: ServerConfig, sock: socket.socket) -> None:
    """Serve an engine on a bound socket until a signal ends it."""
    lifecycle = Lifecycle(max_requests=config.max_queued_requests, drain_timeout_s=config.drain_timeout_s)
    app = build_app(engine, config, lifecycle=lifecycle)
    listen(sock)
    DrainingServer(uvicorn_config(app, config), lifecycle).run(sockets=[sock])


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket. Raises ConfigError if the address is taken or not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as exc:
        raise ConfigError(f"host {host!r} cannot be listened on: {exc.strerror}") from exc
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as exc:
        sock.close()
        raise explain(exc, host, port) from exc
    return sock


def listen(sock: socket.socket) -> None:
    """Listen. Raises ConfigError if another process, which started alongside, was quicker."""
    host, port = sock.getsockname()[:2]
    try:
        sock.listen(BACKLOG)
    except OSError as exc:
        raise explain(exc, host, port) from exc


def explain(exc: OSError, host: str, port: int) -> ConfigError:
    """What stands in the way of an address."""
    if exc.errno == errno.EADDRINUSE:
        return ConfigError(
            f"port {port} on {host} is in use: stop the program that has it, or choose another with --port"
        )
    if exc.errno == errno.EACCES:
        return ConfigError(f"port {port} needs privileges: choose one from 1024 on with --port")
    return ConfigError(f"cannot listen on {host}, port {port}: {exc.strerror or exc}")


def uvicorn_config(app: object, config: ServerConfig) -> uvicorn.Config:
    """Uvicorn's own options."""
    return uvicorn.Config(
        app,  # type: ignore[arg-type]  # any ASGI application
        log_config=None,  # handlers are the CLI's business
        log_level=config.uvicorn_log_level,
        root_path=config.root_path,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        timeout_graceful_shutdown=LAST_WORDS_S,
        server_header=False,
    )


class DrainingServer(uvicorn.Server):
    """A uvicorn server that drains on the first signal and stops on the second, with exit code 0 either way."""

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle) -> None:
        super().__init__(config)
        self._lifecycle = lifecycle

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for sock in sockets or []:
            host, port = sock.getsockname()[:2]
            scheme = "https" if self.config.ssl_certfile else "http"
            shown = f"[{host}]" if ":" in host else host
            logger.info("ready on %s://%s:%d%s", scheme, shown, port, self.config.root_path)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._lifecycle.state is State.READY:
            self._lifecycle.start_draining()
            logger.info(
                "shutting down: %d completions in flight have %g s to finish; signal again to stop at once",
                self._lifecycle.num_in_flight,
                self._lifecycle.drain_timeout_s,
            )
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        over = await super().on_tick(counter) or self._lifecycle.is_drained
        if over:
            self._lifecycle.stop()
        return over
