"""A case of the fuzzer: the numbers that a call is made from, and the line that repeats it.

    topk:seed=7,requests=3,columns=9000,k=512,dtype=float32,kind=relu_sum,lengths=9000/513/0

``op:name=value,…``, with the fields that are not at their default. The values are integers, or
words out of a list, or integers with ``/`` between; nothing in a case is evaluated. The same case
makes the same tensors on the same kind of device.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

__all__ = [
    "Case",
    "CaseError",
    "KeptCase",
    "RequestsCase",
    "describe",
    "flag",
    "number",
    "numbers",
    "one_of",
    "function_of",
    "parse",
]

T = TypeVar("T", bound="Case")
R = TypeVar("R", bound="RequestsCase")


def function_of(name: str) -> Callable[..., Any]:
    """Return the public function of an op."""
    import dsv4_plugin as ours

    functions: dict[str, Callable[..., Any]] = {
        "topk": ours.topk,
        "read": ours.read_indexer_cache,
        "read_mxfp4": ours.read_indexer_cache_mxfp4,
        "gather": ours.gather_indexer_cache,
        "paged_logits": ours.paged_logits,
        "ragged_logits": ours.ragged_logits,
        "select": ours.select,
        "block_maxima": ours.block_maxima,
        "select_blocks": ours.select_blocks,
        "candidate_logits": ours.candidate_logits,
        "candidate_logits_ragged": ours.candidate_logits_ragged,
        "candidate_select": ours.candidate_select,
        "select_candidates": ours.select_candidates,
    }
    return functions[name]


class CaseError(ValueError):
    """A case that cannot be written like this, or means no call."""


def number(default: int, least: int, most: int, about: str) -> Any:
    """Declare a field that is an integer."""
    return dataclasses.field(
        default=default, metadata={"least": least, "most": most, "about": about}
    )


def flag(about: str) -> Any:
    """Declare a field that is 0 or 1."""
    return number(0, 0, 1, about)


def one_of(choices: tuple[str, ...], about: str) -> Any:
    """Declare a field that is one of some words, the first by default."""
    return dataclasses.field(default=choices[0], metadata={"choices": choices, "about": about})


def numbers(words: tuple[str, ...], about: str) -> Any:
    """Declare a field that is one of some words, the first by default, or integers ``a/b/c``."""
    return dataclasses.field(default=words[0], metadata={"words": words, "about": about})


@dataclasses.dataclass(frozen=True)
class Case:
    """What all ops have: a seed, and the implementation to be called."""

    op: ClassVar[str]
    seed: int = number(0, 0, (1 << 31) - 1, "what random numbers are drawn from")
    backend: str = one_of(("auto", "cuda", "triton", "torch"), "the implementation")

    def __str__(self) -> str:
        """Return the line that :func:`parse` reads."""
        values = [(f, getattr(self, f.name)) for f in dataclasses.fields(self)]
        return f"{self.op}:" + ",".join(f"{f.name}={v}" for f, v in values if v != f.default)

    def but(self: T, **changes: Any) -> T:
        """Return the case with some fields changed."""
        return dataclasses.replace(self, **changes)

    def check(self) -> None:
        """Raise :class:`CaseError` unless the case means a call."""

    @property
    def rows(self) -> int:
        """What is counted: rows of scores, or keys."""
        raise NotImplementedError

    def simpler(self: T, rows: list[int]) -> Iterator[T]:
        """Yield simpler cases, the simplest first; ``rows`` are some that were wrong."""
        raise NotImplementedError


class KeptCase(Case):
    """A case of several units (requests, or rows), of which :attr:`keep` chooses a range."""

    keep: str

    @property
    def units(self) -> int:
        """What ``keep`` chooses from."""
        raise NotImplementedError

    @property
    def kept(self) -> tuple[int, int]:
        """The first that is kept, and how many."""
        if not self.keep:
            return 0, self.units
        ends = [int(part) for part in self.keep.split("/")]
        return ends[0], ends[-1] - ends[0] + 1

    def check(self) -> None:
        """Raise :class:`CaseError` unless the case means a call."""
        first, count = self.kept
        if first < 0 or count < 1 or first + count > self.units:
            raise CaseError(f"keep must be two of {self.units}, got {self.keep}")


class RequestsCase(KeptCase):
    """A case of requests with ``next_n`` rows each and lengths, drawn or listed."""

    requests: int
    next_n: int
    graph: int
    lengths: str

    @property
    def units(self) -> int:
        """What ``keep`` chooses from."""
        return self.requests

    @property
    def rows(self) -> int:
        """Rows of the call, once more for each replay."""
        return self.kept[1] * self.next_n * max(1, self.graph)

    def check(self) -> None:
        """Raise :class:`CaseError` unless the case means a call."""
        super().check()
        listed, count = self.lengths.split("/"), self.kept[1]
        if self.lengths not in ("full", "any") and len(listed) != count:
            raise CaseError(f"lengths must have {count} entries, got {len(listed)}")

    def fewer(self: R, rows: list[int], lengths: list[int]) -> Iterator[R]:
        """Yield cases of fewer requests: those of ``rows``, then each half, then one less."""
        first, count = self.kept
        if count > 1:
            parts = [(row // self.next_n, 1) for row in rows[:3]]
            half = count // 2
            for lo, n in (*parts, (0, half), (half, count - half), (0, count - 1)):
                some = "/".join(map(str, lengths[lo : lo + n]))
                yield self.but(keep=f"{first + lo}/{first + lo + n - 1}", lengths=some)
        elif self.lengths in ("full", "any"):
            yield self.but(lengths=str(lengths[0]))
        if self.keep:
            yield self.but(keep="", requests=count)


def parse(text: str, kinds: Mapping[str, type[Case]]) -> Case:
    """Read the line that a case is written as.

    Raises:
        CaseError: no such op or field, or a value it cannot have.
    """
    op, _, rest = text.partition(":")
    if op not in kinds:
        raise CaseError(f"a case begins with its op ({', '.join(kinds)}), got {op!r}")
    fields = {f.name: f for f in dataclasses.fields(kinds[op])}
    values: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        if name not in fields or not equals:
            raise CaseError(f"{op} has the fields {', '.join(fields)}, got {part!r}")
        values[name] = _value(fields[name], value)
    case = kinds[op](**values)
    case.check()
    return case


def _value(field: dataclasses.Field[Any], text: str) -> Any:
    about = field.metadata
    if "least" in about:
        if not re.fullmatch(r"-?\d{1,18}", text):
            raise CaseError(f"{field.name} must be an integer, got {text!r}")
        if not about["least"] <= int(text) <= about["most"]:
            raise CaseError(f"{field.name} must be {about['least']} to {about['most']}, got {text}")
        return int(text)
    if "choices" in about and text not in about["choices"]:
        raise CaseError(f"{field.name} must be one of {', '.join(about['choices'])}, got {text!r}")
    if (
        "words" in about
        and text not in about["words"]
        and not re.fullmatch(r"-?\d{1,18}(/-?\d{1,18})*", text)
    ):
        words = ", ".join(filter(None, about["words"]))
        raise CaseError(f"{field.name} must be {words} or integers a/b/c, got {text!r}")
    return text


def describe(kind: type[Case]) -> list[tuple[str, str]]:
    """Return ``(name and default, what it means and may be)`` of every field."""
    lines = []
    for field in dataclasses.fields(kind):
        about = field.metadata
        if "least" in about:
            values = f"{about['least']} to {about['most']}"
        else:
            values = " ".join(about.get("choices") or (*filter(None, about["words"]), "a/b/c"))
        lines.append((f"{field.name}={field.default}", f"{about['about']}: {values}"))
    return lines
