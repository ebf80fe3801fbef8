"""Requests to a vLLM server: prompts as token ids, and what each request cost."""

from __future__ import annotations

import http.client
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

__all__ = ["Answer", "Client", "at_once", "random_prompt", "together"]

T = TypeVar("T")
R = TypeVar("R")

FIRST_WORD = 3  # below are the special tokens
WORDS = 19_000  # of the tokenizer that examples/make_tiny_v4.py writes


def random_prompt(tokens: int, seed: int) -> list[int]:
    """Return ``tokens`` random token ids; the same ones for the same seed."""
    return random.Random(seed).choices(range(FIRST_WORD, WORDS), k=tokens)


@dataclass
class Answer:
    """One streamed answer; times in seconds of ``time.perf_counter``."""

    sent: float
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent

    @property
    def total(self) -> int:
        """How many tokens came."""
        return sum(self.counts)

    def when(self, tokens: int) -> float:
        """When so many tokens had come; the last one's time if there are fewer."""
        came = 0
        for then, count in zip(self.times, self.counts, strict=True):
            came += count
            if came >= tokens:
                return then
        return self.times[-1]

    def until(self, time: float) -> int:
        """How many tokens had come by then."""
        return sum(n for t, n in zip(self.times, self.counts, strict=True) if t <= time)


class Client:
    """Talks to one server; safe to use from several threads."""

    def __init__(self, host: str, port: int, model: str) -> None:
        self.host, self.port, self.model = host, port, model

    def get(self, path: str, timeout: float = 5) -> int:
        """Return the status of a GET."""
        return self._call("GET", path, None, timeout)[0]

    def read(self, path: str, timeout: float = 30) -> bytes:
        """Return the body of a GET."""
        return self._call("GET", path, None, timeout)[1]

    def post(self, path: str, data: Any = None, timeout: float = 300) -> bytes:
        """Return the body of a POST; an answer other than 200 is an error with its text."""
        status, body = self._call("POST", path, data, timeout)
        if status != 200:
            raise RuntimeError(f"{path}: {status} {body[:300].decode(errors='replace')}")
        return body

    def _call(self, method: str, path: str, data: Any, timeout: float) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            body = None if data is None else json.dumps(data)
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        except http.client.HTTPException as error:  # another protocol, or half of an answer
            raise ConnectionError(f"{path}: no HTTP: {type(error).__name__}: {error}") from error
        finally:
            connection.close()

    def complete(
        self,
        prompt: Sequence[int],
        tokens: int,
        salt: str | None = None,
        ids: bool = False,
        timeout: float = 300,
        began: Callable[[], object] | None = None,
    ) -> Answer:
        """Greedy completion of exactly ``tokens`` tokens, streamed.

        ``salt`` keeps the prefix cache of requests with another salt away. The tokens themselves
        come only with ``ids``: vLLM then sends the prompt back as well, before the first token.
        ``began`` is called when that has come.
        """
        request: dict[str, Any] = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        if ids:
            request["return_token_ids"] = True
        if salt is not None:
            request["cache_salt"] = salt
        body = json.dumps(request)
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            answer = Answer(time.perf_counter())
            connection.request(
                "POST", "/v1/completions", body, {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"completion: {response.status} {response.read()[:300]!r}")
            for line in response:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                now = time.perf_counter()
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise RuntimeError(f"completion: {chunk['error']}")
                new = chunk["usage"]["completion_tokens"] - answer.total
                if new > 0:
                    answer.times.append(now)
                    answer.counts.append(new)
                    if began is not None and len(answer.times) == 1:
                        began()
                if ids:
                    for choice in chunk["choices"]:
                        answer.tokens += choice["token_ids"] or ()
        except http.client.HTTPException as error:
            raise ConnectionError(f"completion: {type(error).__name__}: {error}") from error
        except (LookupError, TypeError, ValueError) as error:  # JSON of another form
            raise RuntimeError(f"completion: {type(error).__name__}: {error}") from error
        finally:
            connection.close()
        if answer.total != tokens or (ids and len(answer.tokens) != tokens):
            raise RuntimeError(f"completion: {answer.total} tokens came, not {tokens}")
        return answer


def at_once(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Do ``work`` on every item at the same time; raises an error once all are done."""
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(work, items))


def together(clients_prompts: Sequence[tuple[Client, Sequence[int]]], tokens: int) -> list[Answer]:
    """Send requests at the same time; returns when all are answered, raises the first error."""
    return at_once(lambda pair: pair[0].complete(pair[1], tokens), clients_prompts)


def time_per_token(answers: Sequence[Answer], lead: int = 1) -> float:
    """Milliseconds a token and request, while every request was decoding.

    From the moment the last of them has ``lead`` tokens to the moment the first of them is done:
    what the requests spend on prefill, and the thinner batch at the end, stay outside. So do the
    first tokens, which come late and then at once: the server is busy with the prompt while the
    GPU decodes already.
    """
    begin = max(answer.when(lead) for answer in answers)
    end = min(answer.times[-1] for answer in answers)
    counts = [answer.until(end) - answer.until(begin) for answer in answers]
    if end <= begin or min(counts) < 2:
        raise RuntimeError(f"{len(answers)} requests did not decode at the same time")
    return (end - begin) * 1e3 / statistics.mean(counts)
