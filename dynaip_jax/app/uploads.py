"""What a page takes from outside: a few addresses, and bodies of limited size."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
OPEN = (  # of Gradio's addresses: what the page and callers of its API need; not those that take files, fetch addresses or ask other hosts
    r"/|/config/?|/theme\.css|/favicon\.ico|/robots\.txt|/(assets|static)/.+"
    r"|/gradio_api/(info/?|app_id/?|startup-events|heartbeat/\w+|queue/(join|data)|call/\w+(/\w+)?)"
)
PICTURE = r"[0-9a-f]{32}\.png"  # names of pictures that were made


class TooMuch(Exception):
    """A body is larger than it may be."""


class Limits:
    """An ASGI application before another: bodies of more than `most` bytes get 413, and addresses that the page has no use for 403.
    Files are given out of `folder` alone, by the names of pictures.

    Uploads come inside of what the page sends, and pass the one door for pictures there; Gradio's own doors for files stay shut.
    """

    def __init__(self, app: App, most: int, folder: Path):
        self.app, self.most = app, most
        self.open = re.compile(f"{OPEN}|/gradio_api/file={re.escape(str(folder))}/{PICTURE}")

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if not self.open.fullmatch(scope["path"]):
            return await _refuse(send, 403, "this page has nothing there")
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if not stated.isdigit() or int(stated) > self.most:
            return await _refuse(send, 413, f"expected at most {self.most} bytes")
        taken, begun = 0, False

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.most:
                raise TooMuch
            return message

        async def sent(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, counted, sent)
        except TooMuch:
            if not begun:
                await _refuse(send, 413, f"expected at most {self.most} bytes")


async def _refuse(send: Send, status: int, why: str) -> None:
    await send(dict(type="http.response.start", status=status, headers=[(b"content-type", b"text/plain")]))
    await send(dict(type="http.response.body", body=f"{why}\n".encode()))
