"""Questions to a vision model behind an OpenAI-compatible endpoint, asked until they are answered, and never paid twice."""

from __future__ import annotations

import email.utils
import hashlib
import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

from dynaip_jax import reading
from dynaip_jax.errors import UserError, reason
from dynaip_jax.schema import typed

KEY = "DYNAIP_JUDGE_KEY"  # of the environment
LARGEST = 1 << 20  # bytes of an answer
TRIES = 6  # of a question that gets no answer
LONGEST_WAIT = 300.0  # seconds between two tries, whatever the server asks for
TEMPORARY = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # answers of a server that may answer later
REMEDY = "check `judge_url`, `judge_model` and the server, and run it again: what is answered is kept"


class Reply(NamedTuple):
    """What a model said, and the tokens that it counted, 0 where it does not say."""

    text: str
    input_tokens: int = 0
    output_tokens: int = 0


class Unanswered(Exception):
    """A question that got no answer in `TRIES` tries; the message says why."""


class Endpoint(NamedTuple):
    """Where a judge listens. `url`: up to and without /chat/completions; `timeout`: seconds of a try; `pause`: what waits between tries."""

    url: str
    model: str
    key: str | None = None
    timeout: float = 120.0
    pause: Callable[[float], object] = time.sleep

    @classmethod
    def of(cls, url: str, model: str, timeout: float) -> Endpoint:
        """With the key of the environment. Raises `UserError` for an address that is none, and for a key that would travel in the open."""
        parts = urllib.parse.urlsplit(url)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.query
            or parts.fragment
            or parts.username
        ):
            raise UserError(
                f"`judge_url` {url}: no address of a server; expected such as http://localhost:8000/v1; correct it"
            )
        key = os.environ.get(KEY) or None
        if key is not None and (not key.isascii() or not key.isprintable()):
            raise UserError(f"{KEY}: holds what no key does; expected printable ASCII; set it anew")
        if key is not None and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise UserError(
                f"`judge_url` {url}: {KEY} would travel unencrypted; expected https; use it, or unset {KEY}"
            )
        return cls(url.rstrip("/"), model, key, timeout)

    def ask(self, messages: Sequence[dict[str, Any]]) -> Reply:
        """The reply to a conversation. Raises `Unanswered` after `TRIES` tries, and `UserError` for what no further try would change."""
        problem = ""
        for number in range(TRIES):
            wait = min(2.0**number, 60.0)
            try:
                return self._try(messages)
            except urllib.error.HTTPError as e:
                problem = f"status {e.code}"
                if e.code not in TEMPORARY:
                    raise UserError(f"{self.url}: {problem} ({_said(e)}); expected an answer; {_remedy(e.code)}") from e
                wait = _retry_after(e.headers.get("Retry-After"), wait)
            except (OSError, HTTPException, ValueError) as e:  # no connection, too late, cut off, no JSON
                inner = getattr(e, "reason", e)
                problem = "timed out" if isinstance(inner, TimeoutError) else reason(str(inner) or type(e).__name__)
            if number < TRIES - 1:
                self.pause(min(wait, LONGEST_WAIT))
        raise Unanswered(f"{problem}, {TRIES} times")

    def _try(self, messages: Sequence[dict[str, Any]]) -> Reply:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        body = json.dumps(dict(model=self.model, messages=list(messages))).encode()
        request = urllib.request.Request(f"{self.url}/chat/completions", body, headers, method="POST")
        with urllib.request.build_opener(_Here).open(request, timeout=self.timeout) as response:
            data = response.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise ValueError(f"an answer of more than {LARGEST} bytes")
        return _reply(reading.parse_json(data, LARGEST, halves=True))


class _Here(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key and the pictures are for one server."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _reply(value: Any) -> Reply:
    """Raises `ValueError` for what is no reply."""
    try:
        content = value["choices"][0]["message"]["content"]
        if isinstance(content, list):
            content = "".join(part.get("text", "") for part in content)
        usage = value.get("usage") or {}
        counts = (usage.get(name) for name in ("prompt_tokens", "completion_tokens"))
        tokens = [n if type(n) is int and 0 <= n < 1 << 40 else 0 for n in counts]
    except (KeyError, IndexError, TypeError, AttributeError) as e:
        raise ValueError(f"an answer without choices[0].message.content ({reason(e)})") from e
    if not isinstance(content, str):
        raise ValueError("an answer that is no text")
    return Reply(content, *tokens)


def _retry_after(header: str | None, otherwise: float) -> float:
    """Seconds that a server asks to wait: a number, or a date."""
    if header is None:
        return otherwise
    try:
        wait = float(header)
    except ValueError:
        try:
            wait = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return otherwise
    return wait if 0 <= wait < float("inf") else otherwise


def _said(error: urllib.error.HTTPError) -> str:
    try:
        text = error.read(500).decode(errors="replace")
    except (OSError, HTTPException, ValueError):
        text = ""
    return reason(text or str(error.reason), 80)


def _remedy(code: int) -> str:
    return f"set {KEY} to a key of that server" if code in (401, 403) else REMEDY


class Cache:
    """Replies on disk, a JSON line each, written the moment they come: one that is there is not asked for, nor paid, again."""

    def __init__(self, path: Path):
        self._path, self._lock = path, threading.Lock()
        self._known: dict[str, Reply] = {}
        data = path.read_bytes() if path.exists() else b""
        for line in data.splitlines():
            try:
                value = reading.parse_json(line, 8 * LARGEST, halves=True)
                tokens = [typed(int, value[name], name) for name in ("input_tokens", "output_tokens")]
                self._known[typed(str, value["key"], "key")] = Reply(typed(str, value["text"], "text"), *tokens)
            except (ValueError, KeyError, TypeError):
                continue  # cut off by a kill
        self._ends = not data or data.endswith(b"\n")

    def get(self, key: str) -> Reply | None:
        """The reply, if it is there."""
        return self._known.get(key)

    def put(self, key: str, reply: Reply) -> None:
        """Keeps a reply. Raises `OSError` if it cannot be written."""
        line = json.dumps(dict(key=key) | reply._asdict()) + "\n"
        with self._lock:
            start, self._ends = b"" if self._ends else b"\n", False  # until it is whole
            with self._path.open("ab") as file:
                file.write(start + line.encode())
                file.flush()
                os.fsync(file.fileno())
            self._ends, self._known[key] = True, reply

    def items(self) -> list[tuple[str, Reply]]:
        """All of them, with their keys."""
        with self._lock:
            return list(self._known.items())

    @property
    def replies(self) -> list[Reply]:
        """All of them."""
        return [reply for _, reply in self.items()]


def key_of(endpoint: Endpoint, messages: Sequence[dict[str, Any]], repeat: int, attempt: int) -> str:
    """What tells a question's reply from others: server, model, all that is asked, and how many times it has been asked before."""
    asked = [endpoint.url, endpoint.model, list(messages), repeat, attempt]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
