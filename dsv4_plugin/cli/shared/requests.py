"""HTTP to a server: one answer, or a stream of lines."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

__all__ = ["ANSWER_S", "Reply", "ask", "opened"]

ANSWER_S = 5.0  # how long a server may take to answer


class Reply(NamedTuple):
    """A status (0: no HTTP answer came), a description of what came, and the body."""

    status: int
    said: str
    body: bytes


@functools.cache  # because it reads the certificates of this machine
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextlib.contextmanager
def opened(
    url: str, path: str, data: bytes | None = None, timeout: float = ANSWER_S
) -> Iterator[http.client.HTTPResponse]:
    """Send a request and return the response for reading; with ``data`` (JSON) it is a POST.

    It uses no proxy for this machine.

    Raises:
        urllib.error.HTTPError: the status is an error.
        ConnectionError: another protocol, or half an answer; also raised while the caller reads.
        OSError: there is no answer.
    """
    at = urlsplit(url)
    user, _, place = at.netloc.rpartition("@")
    whole = at._replace(netloc=place, path=at.path.rstrip("/") + path).geturl()
    about = {} if data is None else {"Content-Type": "application/json"}
    request = urllib.request.Request(whole, data, about)
    if user:
        word = base64.b64encode(unquote(user).encode()).decode()
        request.add_header("Authorization", f"Basic {word}")
    try:
        with _opener().open(request, timeout=timeout) as answer:
            yield answer
    except http.client.HTTPException as error:
        said = f"no answer that is HTTP: {type(error).__name__}: {str(error)!r:.100}"
        raise ConnectionError(said) from error


def ask(url: str, path: str, data: Any = None, timeout: float = ANSWER_S, most: int = -1) -> Reply:
    """Send a request and return the answer with at most ``most`` bytes of body; never raises.

    ``data`` becomes JSON and makes the request a POST.
    """
    try:
        sent = None if data is None else json.dumps(data).encode()
        with opened(url, path, sent, timeout) as answer:
            return Reply(answer.status, f"HTTP {answer.status}", answer.read(most))
    except urllib.error.HTTPError as error:
        body = b""
        with error, contextlib.suppress(OSError, http.client.HTTPException):
            body = error.read(most)
        return Reply(error.code, f"HTTP {error.code}", body)
    except (OSError, ValueError) as error:
        said = str(getattr(error, "reason", None) or error)
        return Reply(0, said if said.startswith("no answer") else f"no answer: {said:.100}", b"")
