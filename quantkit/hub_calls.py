"""Calls of the Hub: tried again where that helps, told in one sentence where it does not, and never with the token.

The client tries uploads again itself, but not the calls that make a commit, a repository or a branch, nor downloads
that a server's error ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from quantkit.errors import InputError, MissingError, QuantkitError
from quantkit.progress import Progress

T = TypeVar("T")

TRANSIENT = (408, 429, 500, 502, 503, 504)
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further try
LONGEST = 300.0  # seconds that the Hub may ask us to wait; beyond that the user is told
_AGAIN = "run the same command again later: files that were sent whole are not sent again"
ADVICE = {
    401: "log in with a token that may write: hf auth login, or set HF_TOKEN",
    403: "the token may not do this; use one that may write there",
    404: "check the name, and that the token may see it",
    409: "another change to it is under way; run the same command again",
    412: "somebody else has committed to the branch meanwhile; look at it, then push again",
    429: f"the Hub asks for fewer calls; {_AGAIN}",
}
_KEPT = "run the same command again later: files that came whole are kept"
READING = {
    401: "log in: hf auth login, or set HF_TOKEN",
    403: "accept the terms on its page, and log in with a token that may read it: hf auth login",
    404: "check the name, and that the token may see it",
    429: f"the Hub asks for fewer calls; {_KEPT}",
}


@dataclass(frozen=True)
class Failure:
    """What became of a call. status: of HTTP, None when no answer came; wait: seconds that the Hub asks for."""

    status: int | None
    said: str
    transient: bool
    wait: float = 0.0


class Calls:
    """Runs calls of the Hub: `calls("read the branch", api.model_info, repo)`. reading: nothing is sent there."""

    def __init__(self, token: str | None, progress: Progress, *, reading: bool = False) -> None:
        self._token = token
        self._progress = progress
        self._advice, self._again = (READING, _KEPT) if reading else (ADVICE, _AGAIN)

    def __call__(
        self,
        what: str,
        function: Callable[..., T],
        *arguments: Any,
        once: bool = False,
        recovered: Callable[[Failure], T | None] | None = None,
        **keywords: Any,
    ) -> T:
        """The call's result.

        what       for messages, as in "could not {what}"
        once       the client itself tries it again
        recovered  asked after each failure; a result that is not None is the call's
        Raises InputError for what the Hub refuses, MissingError for what it cannot do now.
        """
        for wait in (*WAITS, None):
            try:
                return function(*arguments, **keywords)
            except QuantkitError:
                raise
            except Exception as e:
                found_out = understood(e)
                if found_out is None:
                    raise
            failure = found_out
            if recovered is not None and (found := recovered(failure)) is not None:
                return found
            pause = max(wait or 0.0, failure.wait)
            if once or wait is None or not failure.transient or pause > LONGEST:
                break
            self._progress.say(self.clean(f"could not {what}: {failure.said}; again in {pause:g} s"))
            _sleep(pause)
        raise self.error(what, failure)

    def error(self, what: str, failure: Failure) -> QuantkitError:
        advice = self._advice.get(failure.status or 0) or self._again
        kind = MissingError if failure.transient else InputError
        return kind(self.clean(f"could not {what}: {failure.said}; {advice}"))

    def clean(self, text: str) -> str:
        """The text without the token, whatever put it there."""
        return text.replace(self._token, "***") if self._token else text

    def holds_token(self, content: bytes) -> bool:
        return bool(self._token) and str(self._token).encode() in content


def understood(error: BaseException) -> Failure | None:
    """What an exception of the client means; None for one that says nothing about the Hub."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OfflineModeIsEnabled):
            return Failure(None, "offline mode is on; unset HF_HUB_OFFLINE", False)
        if isinstance(seen, HfHubHTTPError):
            status = seen.response.status_code
            said = seen.server_message or seen.response.headers.get("X-Error-Message") or _line(seen)
            wait = asked_to_wait(seen.response.headers)
            return Failure(status, f"the Hub answered {status} ({said})", status in TRANSIENT, wait)
        if isinstance(seen, (HTTPError, ConnectionError)):
            return Failure(None, f"no answer from the Hub ({type(seen).__name__}: {_line(seen)})", True)
        seen = seen.__cause__ or seen.__context__
    if isinstance(error, RuntimeError):  # what the client wraps around a failed upload
        return Failure(None, _line(error), True)
    if isinstance(error, ValueError):
        return Failure(None, _line(error), False)
    return None


def asked_to_wait(headers: Mapping[str, str]) -> float:
    """Seconds by Retry-After, or by the Hub's `ratelimit: "api";r=0;t=55`; 0 when neither is there."""
    found = headers.get("retry-after") or headers.get("Retry-After") or ""
    if found.strip().isdigit():
        return float(found)
    for part in (headers.get("ratelimit") or "").split(";"):
        key, _, value = part.strip().partition("=")
        if key == "t" and value.isdigit():
            return float(value) + 1
    return 0.0


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:300]


def _sleep(seconds: float) -> None:
    time.sleep(seconds)
