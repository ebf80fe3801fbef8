"""A case of the fuzzer: the numbers that a call is made from, and the line that repeats it.

    topk:seed=7,requests=3,columns=9000,k=512,dtype=float32,kind=relu_sum,lengths=9000/513/0

The line is ``op:name=value,…``, with the fields that do not have their default. A value is an
integer, a word out of a list, or integers with ``/`` between them. The fuzzer evaluates no code
in a case. The same case makes the same tensors on the same kind of device.

The declaration of a field has everything about it: its allowed values, the values that are drawn,
and the plain values that shrinking tries.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import dsv4_plugin

__all__ = [
    "FORMS", "Case", "CaseError", "KeptCase", "RequestsCase", "backend_of", "describe", "flag",
    "function_of", "number", "numbers", "one_of", "parse", "smaller",
]  # fmt: skip

T = TypeVar("T", bound="Case")
K = TypeVar("K", bound="KeptCase")

FORMS = {  # of lengths → whether there is one for every row
    "rows": True,
    "batch": False,
    "batch1": False,
    "two_d": True,
    "strided": True,
}


def function_of(name: str) -> Callable[..., Any]:
    """Return the public function of an op."""
    reads = {"read": "read_indexer_cache", "read_mxfp4": "read_indexer_cache_mxfp4",
             "gather": "gather_indexer_cache"}  # fmt: skip
    return getattr(dsv4_plugin, reads.get(name, name))


class CaseError(ValueError):
    """A case that cannot be written like this, or means no call."""


def number(
    default: int,
    least: int,
    most: int,
    about: str,
    draw: Sequence[int | range] = (),
    plain: int | None = None,
) -> Any:
    """Declare a field that is an integer.

    Args:
        default: the value that a case does not name.
        least: the smallest value.
        most: the largest.
        about: what it means.
        draw: what is drawn, each as likely: values, and ranges of them. None: the default.
        plain: the value that shrinking goes to; the default where None.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "least": least, "most": most, "about": about, "draw": draw,
            "plain": (default if plain is None else plain,),
        },
    )  # fmt: skip


def flag(about: str, draw: Sequence[int] = (0, 1)) -> Any:
    """Declare a field that is 0 or 1."""
    return number(0, 0, 1, about, draw)


def one_of(
    choices: Sequence[str], about: str, draw: Sequence[str] = (), plain: Sequence[str] = ()
) -> Any:
    """Declare a field that is one of some words, the first by default.

    ``plain``: what shrinking tries, the plainest first; the default where there is none.
    """
    return dataclasses.field(
        default=choices[0],
        metadata={"choices": choices, "about": about, "draw": draw or choices,
                  "plain": plain or choices[:1]},
    )  # fmt: skip


def numbers(words: tuple[str, ...], about: str, draw: Sequence[str] = ()) -> Any:
    """Declare a field that is one of some words, the first by default, or integers ``a/b/c``."""
    return dataclasses.field(
        default=words[0], metadata={"words": words, "about": about, "draw": draw}
    )


def smaller(value: int) -> list[int]:
    """Return smaller positive numbers: a few small ones, parts of it, and a little less."""
    some = [1, 2, 3, 4, 8, *(value - value // part for part in (2, 4, 8, 32, 128)), value - 1]
    return sorted({n for n in some if 0 < n < value})


def backend_of(r: random.Random, backends: tuple[str, ...]) -> str:
    """Draw an implementation of an op that has no Triton form."""
    return r.choice([b for b in ("auto", *backends) if b != "triton"])


@dataclasses.dataclass(frozen=True)
class Case:
    """What all ops have: a seed, and the implementation to be called."""

    op: ClassVar[str]
    seed: int = number(0, 0, (1 << 31) - 1, "what random numbers are drawn from", plain=1)
    backend: str = one_of(("auto", "cuda", "triton", "torch"), "the implementation")

    def __str__(self) -> str:
        """Return the line that :func:`parse` reads."""
        values = [(f, getattr(self, f.name)) for f in dataclasses.fields(self)]
        return f"{self.op}:" + ",".join(f"{f.name}={v}" for f, v in values if v != f.default)

    @classmethod
    def draw(cls: type[T], seed: int, device: str, backends: tuple[str, ...]) -> T:
        """Draw a case that the implementations take; a GPU gets larger ones."""
        return cls._draw(random.Random(f"{cls.op} {seed}"), device == "cuda", backends)

    @classmethod
    def _draw(cls: type[T], r: random.Random, gpu: bool, backends: tuple[str, ...]) -> T:
        raise NotImplementedError

    @classmethod
    def drawn(cls: type[T], r: random.Random, **given: Any) -> T:
        """Return a case of what is given, and draw the other fields by their declarations."""
        given.setdefault("seed", r.randint(0, (1 << 31) - 1))
        for f in dataclasses.fields(cls):
            if f.name not in given and f.metadata["draw"]:
                value = r.choice(f.metadata["draw"])
                given[f.name] = r.choice(value) if isinstance(value, range) else value
        return cls(**given)

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
        fields = [f for f in dataclasses.fields(self) if f.name not in self._fixed]
        for f in fields:
            now, plain = getattr(self, f.name), f.metadata.get("plain", ())
            for value in plain[: plain.index(now) if now in plain else None]:
                yield self.but(**{f.name: value})
        for f in fields:
            now = getattr(self, f.name)
            if isinstance(now, int):
                for value in smaller(now):
                    if value > f.metadata["plain"][0]:
                        yield self.but(**{f.name: value})
        if self.seed > 1:
            yield self.but(seed=1)

    @property
    def _fixed(self) -> tuple[str, ...]:
        """Fields that are not shrunk by themselves."""
        return ("seed",)


@dataclasses.dataclass(frozen=True)
class KeptCase(Case):
    """A case of several units (requests, rows, slots), of which :attr:`keep` chooses a range.

    All units are drawn, whatever is kept, so that a unit does not change when others are left out.
    """

    keep: str = numbers(("",), "first and last that are called with, of those drawn, a/b")

    unit: ClassVar[str]  # the field that counts what is drawn
    listable: ClassVar[tuple[str, ...]] = ()  # fields with a number for each unit that is kept

    @property
    def kept(self) -> tuple[int, int]:
        """The first that is kept, and how many."""
        if not self.keep:
            return 0, getattr(self, self.unit)
        ends = [int(part) for part in self.keep.split("/")]
        return ends[0], ends[-1] - ends[0] + 1

    @property
    def each(self) -> int:
        """Rows of a unit."""
        return 1

    def lists(self) -> dict[str, list[int]]:
        """Return the numbers of the fields that are :attr:`listable`."""
        return {}

    def listed(self, name: str) -> list[int] | None:
        """Return the numbers of such a field if the case names them."""
        text = getattr(self, name)
        return None if text[:1].isalpha() else [int(x) for x in text.split("/")]

    def check(self) -> None:
        """Raise :class:`CaseError` unless the case means a call."""
        units = getattr(self, self.unit)
        first, count = self.kept
        if first < 0 or count < bool(self.keep) or first + count > units:
            raise CaseError(f"keep must be two of {units}, got {self.keep}")
        for name in self.listable:
            values = self.listed(name)
            if values is not None and len(values) != count:
                raise CaseError(f"{name} must have {count} entries, got {len(values)}")

    def simpler(self: K, rows: list[int]) -> Iterator[K]:
        """Yield cases of fewer units first: those of ``rows``, each half, one less."""
        (first, count), lists = self.kept, self.lists()

        def of(lo: int, n: int) -> dict[str, str]:
            return {name: "/".join(map(str, x[lo : lo + n])) for name, x in lists.items()}

        if count > 1:
            half = count // 2
            ones = [(row // self.each, 1) for row in rows[:3]]
            for lo, n in (*ones, (0, half), (half, count - half), (0, count - 1)):
                yield self.but(keep=f"{first + lo}/{first + lo + n - 1}", **of(lo, n))
        if 0 < count <= 64 and any(self.listed(name) is None for name in lists):
            yield self.but(**of(0, count))
        if self.keep:
            yield self.but(keep="", **{self.unit: count})
        yield from super().simpler(rows)
        for name, values in lists.items():
            if self.listed(name) is not None:
                for at, value in enumerate(values[:4]):
                    for n in smaller(max(value, 0)):
                        some = [*values[:at], n, *values[at + 1 :]]
                        yield self.but(**{name: "/".join(map(str, some))})

    @property
    def _fixed(self) -> tuple[str, ...]:
        return "seed", "keep", self.unit


@dataclasses.dataclass(frozen=True)
class RequestsCase(KeptCase):
    """A case of requests with ``next_n`` rows each and lengths, drawn or listed."""

    requests: int = number(1, 1, 1 << 20, "requests that are drawn")
    next_n: int = number(1, 1, 64, "rows of a request", (1, 1, 1, 2, 3, 4, 5, 6))
    lengths: str = numbers(
        ("full", "any"), "of the requests that are kept", ("full", "any", "any", "any")
    )
    form: str = one_of(tuple(FORMS), "shape of lengths")
    wide: int = flag("lengths and row starts are int64")
    graph: int = number(
        0, 0, 64, "replays of a CUDA graph with other content and lengths", (0, 0, 0, 0, 0, 1, 3)
    )

    unit, listable = "requests", ("lengths",)

    @property
    def context(self) -> int:
        """What a full row sees."""
        raise NotImplementedError

    @property
    def rows(self) -> int:
        """Rows of the call, once more for each replay."""
        return self.kept[1] * self.next_n * max(1, self.graph)

    @property
    def each(self) -> int:
        """Rows of a request."""
        return self.next_n

    def lists(self) -> dict[str, list[int]]:
        """Return the lengths."""
        return {"lengths": self.requests_of(0)}

    def requests_of(self, step: int) -> list[int]:
        """Return the lengths of the requests that are kept; ``step`` counts replays."""
        first, count = self.kept
        if self.lengths == "full":
            return [self.context] * count
        listed = self.listed("lengths")
        if listed is not None:
            return listed
        r = random.Random(f"lengths {self.seed} {step}")
        return [self.length(r) for _ in range(self.requests)][first : first + count]

    def length(self, r: random.Random) -> int:
        """Draw the length of a request."""
        raise NotImplementedError


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
