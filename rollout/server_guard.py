"""Lets nobody use a vLLM server without its key; `--middleware rollout.server_guard.RequireKey` puts it in front.

vLLM 0.31 asks for its key on /v1 and a few other paths only. The routes that pause a server, change its weights or call any
method of its workers are open to whoever reaches the port.
"""

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

KEY_VARIABLE = "VLLM_API_KEY"
OPEN_PATHS = ("/health",)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class RequireKey:
    """ASGI middleware that answers 401 to requests without `Authorization: Bearer KEY`, on every path but /health.

    Args:
        app: What it stands in front of.

    Raises:
        ValueError: The environment has no key, so the server must not start.
    """

    def __init__(self, app: App):
        key = os.environ.get(KEY_VARIABLE, "")
        if not key.strip():
            raise ValueError(f"{KEY_VARIABLE} is empty: set it to the key that this server shall ask for")
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan" or scope.get("path") in OPEN_PATHS or self._knows_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "no valid key"})
        else:
            body = b'{"error": "no valid key: send Authorization: Bearer KEY"}'
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _knows_key(self, scope: Message) -> bool:
        values = [value for name, value in scope.get("headers", ()) if name.lower() == b"authorization"]
        if len(values) != 1:
            return False
        scheme, _, key = values[0].partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key, self._key)
