"""Requests to a server: prompts as token ids, and what each request cost."""

from __future__ import annotations

import json
import random
import statistics
import time
import urllib.error
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from benchmarks.server.engines import Answer, Engine, Request
from dsv4_plugin.cli.shared.requests import ask, opened

__all__ = ["Client", "TooFew", "at_once", "random_prompt", "time_per_token", "together"]

T = TypeVar("T")
R = TypeVar("R")

FIRST_WORD = 8  # below are the special tokens
WORDS = 19_000  # with the tokenizer that examples/make_tiny_v4.py writes


class TooFew(RuntimeError):
    """Requests decoded at the same time for too few tokens to be timed."""


def random_prompt(tokens: int, seed: int) -> list[int]:
    """Return ``tokens`` random token ids; the same ones for the same seed."""
    return random.Random(seed).choices(range(FIRST_WORD, WORDS), k=tokens)


class Client:
    """Talks to one server; safe to use from several threads."""

    def __init__(self, url: str, engine: Engine) -> None:
        self.url, self.engine = url, engine

    def read(self, path: str, data: Any = None, timeout: float = 300) -> bytes:
        """Return the body of a GET, or of a POST of ``data``.

        Raises:
            RuntimeError: an answer other than 200, with its text.
        """
        reply = ask(self.url, path, data, timeout)
        if reply.status != 200:
            raise RuntimeError(f"{path}: {reply.said} {reply.body[:300].decode(errors='replace')}")
        return reply.body

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

        Requests with different ``salt`` share no prefix cache. The engine is sure to return the
        token ids only with ``ids``. ``began`` is called when the first token has come.
        """
        engine = self.engine
        body = json.dumps(engine.body(Request(prompt, tokens, salt, ids))).encode()
        answer = Answer(time.perf_counter())
        try:
            with opened(self.url, engine.path, body, timeout) as response:
                for line in response:
                    if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                        continue
                    now = time.perf_counter()
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        raise RuntimeError(f"completion: {chunk['error']}")
                    new = engine.read(chunk, answer) - answer.total
                    if new > 0:
                        answer.times.append(now)
                        answer.counts.append(new)
                        if began is not None and len(answer.times) == 1:
                            began()
        except urllib.error.HTTPError as error:
            with error:
                raise RuntimeError(f"completion: {error.code} {error.read()[:300]!r}") from error
        except (LookupError, TypeError, ValueError) as error:  # JSON of another form
            raise RuntimeError(f"completion: {type(error).__name__}: {error}") from error
        if answer.total != tokens or (ids and len(answer.tokens) != tokens):
            raise RuntimeError(f"completion: {answer.total} tokens came, not {tokens}")
        return answer


def at_once(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Do ``work`` on every item at the same time; raise the first error after all have ended."""
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(work, items))


def together(clients_prompts: Sequence[tuple[Client, Sequence[int]]], tokens: int) -> list[Answer]:
    """Send requests at the same time; returns when all are answered, raises the first error."""
    return at_once(lambda pair: pair[0].complete(pair[1], tokens), clients_prompts)


def time_per_token(answers: Sequence[Answer], lead: int = 1, least: int = 2) -> float:
    """Milliseconds a token and request, while every request was decoding.

    From the moment the last of them has ``lead`` tokens to the moment the first of them is done:
    what the requests spend on prefill, and the thinner batch at the end, stay outside. So do the
    first tokens, which come late and then at once: the server is busy with the prompt while the
    GPU decodes already. No time begins or ends with a piece of the tokens of many steps
    (:meth:`.Answer.steady`).

    Raises:
        TooFew: a request has fewer than ``least`` tokens there.
    """
    begins, ends = zip(*(answer.steady(lead) for answer in answers), strict=True)
    begin, end = max(begins), min(ends)
    counts = [answer.until(end) - answer.until(begin) for answer in answers]
    if end <= begin or min(counts) < least:
        raise TooFew(f"{len(answers)} requests did not decode at the same time for {least} tokens")
    return (end - begin) * 1e3 / statistics.mean(counts)
