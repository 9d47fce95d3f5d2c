"""What a client may ask of `quantkit serve`, checked before transformers' server sees it.

That server answers wrong values with 500 where they break something inside, ignores some silently, and has routes that
load any model of the Hub. `Guard` stands before it: only the routes of ROUTES pass, a body that cannot be meant gets
400 and a sentence, in OpenAI's form, and the model has one plain name.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ROUTES = {CHAT: ("POST",), COMPLETIONS: ("POST",), "/v1/models": ("GET",), "/health": ("GET", "HEAD")}
LARGEST = 8 << 20  # bytes of a body
STOPS = 16
# name -> types, smallest (or None), whether that itself is too small, largest
NUMBERS: dict[str, tuple[tuple[type, ...], float | None, bool, float | None]] = {
    "temperature": ((int, float), 0, False, 100),
    "top_p": ((int, float), 0, True, 1),
    "max_tokens": ((int,), 1, False, None),
    "max_completion_tokens": ((int,), 1, False, None),
    "seed": ((int,), -(2**63), False, 2**63 - 1),
    "frequency_penalty": ((int, float), -1, True, 2),
    "n": ((int,), 1, False, 1),
    "best_of": ((int,), 1, False, 1),
}
# Known to the server, but with continuous batching it would pass them over in silence.
NOT_BATCHED = ("frequency_penalty", "logit_bias", "seed")


class BadRequest(Exception):
    """A request that cannot be done: the status, a sentence, and the field that it is about."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.status = message, param, status

    def body(self) -> dict[str, Any]:
        kind = "not_found_error" if self.status == 404 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": None}}


def parsed(data: bytes) -> dict[str, Any]:
    """A body. Raises BadRequest for what is no JSON object."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise BadRequest("the body is not JSON") from None
    if not isinstance(body, dict):
        raise BadRequest(f"the body is a JSON {type(body).__name__}, not an object")
    return body


def checked(route: str, body: dict[str, Any], name: str, *, batching: bool) -> dict[str, Any]:
    """The body as the server takes it: with the model's name, without null fields. Raises BadRequest.

    name      of the model that is served
    batching  whether requests share batches
    """
    body = {key: value for key, value in body.items() if value is not None}
    if body.setdefault("model", name) != name:
        raise BadRequest(f"the model {body['model']!r} is not served here; it is {name!r}", "model", 404)
    if not isinstance(body.get("stream", False), bool):
        raise BadRequest("stream must be true or false", "stream")
    for key, rule in NUMBERS.items():
        if key in body:
            _check_number(key, body[key], *rule)
    if "stop" in body:
        body["stop"] = _stops(body["stop"])
    if "generation_config" in body:
        raise BadRequest("generation_config is not taken; use the fields of OpenAI's API", "generation_config")
    if not isinstance(body.get("logit_bias", {}), dict):
        raise BadRequest("logit_bias must be an object", "logit_bias")
    for key in NOT_BATCHED if batching else ():
        if body.get(key):
            raise BadRequest(f"{key} needs a server that was started with --no-continuous-batching", key)
    if route == CHAT:
        _check_messages(body.get("messages"))
    elif not isinstance(body.get("prompt"), str) or not body["prompt"]:
        raise BadRequest("prompt must be a string that is not empty", "prompt")
    return body


def _check_number(
    key: str, value: Any, types: tuple[type, ...], low: float | None, open_below: bool, high: float | None
) -> None:
    """Raises BadRequest for what is no number, NaN, or out of bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isinstance(value, types):
        raise BadRequest(f"{key} must be {'an integer' if types == (int,) else 'a number'}, not {value!r}", key)
    low_ok = low is None or (value > low if open_below else value >= low)
    if not (low_ok and (high is None or value <= high)):
        above = "" if low is None else f"{'above' if open_below else 'at least'} {low}"
        bounds = " and ".join(part for part in (above, "" if high is None else f"at most {high}") if part)
        raise BadRequest(f"{key} is {value}; it must be {bounds}", key)


def _stops(stop: Any) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops) or len(stops) > STOPS:
        raise BadRequest(f"stop must be a string, or up to {STOPS} of them, none empty", "stop")
    return stops


def _check_messages(messages: Any) -> None:
    """Raises BadRequest for what is no list of text messages: pictures and sounds would be fetched from anywhere."""
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list that is not empty", "messages")
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequest(f"{where} must be an object with a role", "messages")
        content = message.get("content")
        if isinstance(content, list):
            if not all(
                isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
            ):
                raise BadRequest(f"{where}.content must be text; this server takes nothing else", "messages")
        elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise BadRequest(f"{where}.content must be a string", "messages")


class Guard:
    """The server's application with the checks before it (ASGI)."""

    def __init__(self, app: App, name: str, *, batching: bool, made: int) -> None:
        self.app, self.name, self.batching, self.made = app, name, batching, made

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            route, method = scope["path"], scope["method"]
            if route not in ROUTES:
                raise BadRequest(f"there is no {route} here; there are {', '.join(ROUTES)}", status=404)
            if method not in ROUTES[route]:
                raise BadRequest(f"{route} takes {' or '.join(ROUTES[route])}, not {method}", status=405)
            if route == "/v1/models":
                model = {"id": self.name, "object": "model", "created": self.made, "owned_by": "quantkit"}
                await answer(send, 200, {"object": "list", "data": [model]})
                return
            if method == "POST":
                body = checked(route, parsed(await _read(receive)), self.name, batching=self.batching)
                scope, receive = _again(scope, json.dumps(body).encode(), receive)
        except BadRequest as e:
            await answer(send, e.status, e.body())
            return
        await self.app(scope, receive, send)


async def answer(send: Send, status: int, body: dict[str, Any]) -> None:
    """A whole response of JSON."""
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


async def _read(receive: Receive) -> bytes:
    data = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadRequest("the client went away")
        data += message.get("body", b"")
        if len(data) > LARGEST:
            raise BadRequest(f"the body is larger than {LARGEST >> 20} MiB", status=413)
        if not message.get("more_body"):
            return data


def _again(scope: Scope, data: bytes, receive: Receive) -> tuple[Scope, Receive]:
    """The same request with another body; what comes after it (that the client goes away) is still heard."""
    headers = [
        (k, v) for k, v in scope["headers"] if k not in (b"content-length", b"content-type", b"transfer-encoding")
    ]
    headers += [(b"content-length", str(len(data)).encode()), (b"content-type", b"application/json")]
    given = False

    async def next_message() -> dict[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": data, "more_body": False}

    return {**scope, "headers": headers}, next_message
