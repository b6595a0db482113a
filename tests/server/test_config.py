from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from shardwright.errors import ConfigError
from shardwright.server import ServerConfig


def test_every_option_has_help() -> None:
    assert all(field.metadata.get("help") for field in dataclasses.fields(ServerConfig))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"port": 65536}, "port is 65536"),
        ({"port": -1}, "port is -1"),
        ({"drain_timeout_s": -1.0}, "drain_timeout_s is -1"),
        ({"drain_timeout_s": float("nan")}, "drain_timeout_s is nan"),
        ({"max_queued_requests": 0}, "max_queued_requests"),
        ({"uvicorn_log_level": "loud"}, "loud"),
        ({"root_path": "api"}, "write /api"),
        ({"ssl_keyfile": "key.pem"}, "both"),
        ({"ssl_keyfile": "no.pem", "ssl_certfile": "no.pem"}, "no.pem"),
    ],
)
def test_bad_option_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ServerConfig(**options)


def test_key_is_not_shown() -> None:
    assert "sesame" not in repr(ServerConfig(api_key="sesame"))


@pytest.mark.parametrize(
    ("text", "origins"),
    [
        ("*", ["*"]),
        ("", []),
        ("http://a, http://b", ["http://a", "http://b"]),
        ('["http://a", "*"]', ["http://a", "*"]),
    ],
)
def test_origins_are_separated_by_commas_or_a_json_list(text: str, origins: list[str]) -> None:
    assert ServerConfig(allowed_origins=text).origins == origins


def test_broken_list_of_origins_is_refused() -> None:
    with pytest.raises(ConfigError, match="JSON list"):
        _ = ServerConfig(allowed_origins='["http://a"').origins


def test_chat_template_is_a_file_or_the_template_itself(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages }}")
    assert ServerConfig(chat_template=str(file)).read_chat_template() == "{{ messages }}"
    assert ServerConfig(chat_template="{% raw %}").read_chat_template() == "{% raw %}"
    assert ServerConfig().read_chat_template() is None
    with pytest.raises(ConfigError, match="cannot be read"):
        ServerConfig(chat_template=str(tmp_path / "none.jinja")).read_chat_template()
