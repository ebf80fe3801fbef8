"""The figures of docs/development/{sglang,tokenspeed}.md, and ``engines`` of docs/results.md.

``python -m benchmarks.tables sglang`` (or ``tokenspeed``, ``engines``) prints the text between the
markers of that name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.engines.choices import SGLANG_CALLS, TOKENSPEED_CALLS
from benchmarks.engines.forward.variants import OFF, VARIANTS
from benchmarks.tables import readme as figures

__all__ = ["engines", "sglang", "tokenspeed"]

ADAPTERS, SGLANG, TOKENSPEED = "h100_adapters.json", "h100_sglang.json", "h100_tokenspeed.json"
CALLS = {"sglang": SGLANG_CALLS, "tokenspeed": TOKENSPEED_CALLS}
Row = dict[str, Any]
Cells = dict[str, dict[str, Row]]  # a row of a table → implementation or variant → its result


def sglang() -> str:
    """Return the Markdown between the ``sglang`` markers of docs/development/sglang.md."""
    forward, adapters = figures.load(SGLANG), figures.load(ADAPTERS)
    cells = _forward(forward)
    table = _table(
        "the indexer's forward of a layer",
        cells,
        [OFF, *_variants(cells)],
        {OFF: "SGLang"},
        ("agreement of bf16: mean, worst row", lambda row: _agreement(row.get("bf16"))),
    )
    alone = _cells(adapters, "sglang")
    return "\n".join([
        f"{_head(forward, SGLANG)} {forward['version']}, k = 512, a layer's "
        "`forward_c4_indexer` with its projections, µs in a CUDA graph. The columns are SGLang "
        "without the plugin, and with it for each `DSV4_TOPK`, on DeepGEMM's logits or on the "
        "plugin's (`plugin`); with `auto` the plugin chooses. A `raw` call also returns the row's "
        "indices. In a `v1` call SGLang "
        "uses its older top-k.",
        "",
        *table,
        "",
        *(_against(_default(cells), name, [OFF], "SGLang's default")
          for name in _variants(cells)),
        f"- {_checked(forward)} The agreement is with SGLang's own selection on float32 scores; "
        f"that of `fp32` is at least {_least(cells, 'fp32')}, of `fp32 plugin` "
        f"{_least(cells, 'fp32 plugin')}.",
        "",
        f"{_head(adapters, ADAPTERS)} The top-k alone, in the form of each call, by `--part "
        f"kernels`; SGLang's two kernels read float32.{_missing(adapters, 'sglang')}",
        "",
        *_table("call, rows x columns", alone, _names(alone), {}),
        "",
        *(
            _against(alone, plugin, [engine], engine)
            for plugin in ("dsv4 bfloat16", "dsv4 float32")
            for engine in _names(alone)
            if not engine.startswith("dsv4")
        ),
    ])  # fmt: skip


def tokenspeed() -> str:
    """Return the Markdown between the ``tokenspeed`` markers of docs/development/tokenspeed.md."""
    driver, adapters = figures.load(TOKENSPEED), figures.load(ADAPTERS)
    every = _cells(adapters, "tokenspeed")
    alone = _selections(every)
    reads = {name: row for name, row in every.items() if name not in alone}
    names = _names(alone)
    peers = [name for name in names if not name.startswith("dsv4")]
    parts = _forward(driver)
    return "\n".join([
        f"{_head(adapters, ADAPTERS)} The registered kernels beside TokenSpeed's own, k = 512, "
        "scores and selection in one call, µs in a CUDA graph, by `--part kernels`. Without "
        f"`plugin logits` DeepGEMM writes them.{_missing(adapters, 'tokenspeed')}",
        "",
        *_table(
            "call, rows x columns", alone, names, {},
            ("recall of the plugin in bf16, fp32", lambda row: ", ".join(
                f"{row[name]['recall']:.3f}" for name in ("dsv4 bfloat16", "dsv4 float32")
                if "recall" in row.get(name, {})) or "–"),
        ),
        "",
        *(_against(alone, name, peers, " and ".join(peers)) for name in names
          if name.startswith("dsv4")),
        "- Recall is the share of the best keys that a kernel selects; the best keys are those by "
        "float64 scores of the bfloat16 queries. On average over the rows of a cell TokenSpeed, "
        "which does not round the queries to FP8, has at least "
        f"{min(_recalls(alone, peers)):.3f}, and the plugin at least "
        f"{min(_recalls(alone, [n for n in names if n not in peers])):.3f}. The driver checks that "
        "the plugin is exact on the scores that it selected on.",
        "",
        *([*_table("reads, slots x pages", reads, _names(reads), {}), ""] if reads else []),
        f"{_head(driver, TOKENSPEED)} {driver['version']}, its facades by "
        f"`--part forward`, µs in a CUDA graph.{_missing(driver)}",
        "",
        *_table(
            "facade", parts, [OFF, *_variants(parts)], {OFF: "TokenSpeed"},
            ("agreement of bf16: mean, worst row", lambda row: _agreement(row.get("bf16"))),
        ),
        "",
        f"- {_checked(driver)} The agreement is with TokenSpeed's own selection on float32 scores "
        "of queries that were not rounded.",
        *_reader(driver),
    ])  # fmt: skip


def engines() -> str:
    """Return the Markdown between the ``engines`` markers of docs/results.md."""
    forward, adapters, driver = map(figures.load, (SGLANG, ADAPTERS, TOKENSPEED))
    cells, alone = _default(_forward(forward)), _cells(adapters, "sglang")
    newest = max(name for name in _names(alone) if not name.startswith("dsv4"))
    scored = _selections(_cells(adapters, "tokenspeed"))
    peers = [name for name in _names(scored) if not name.startswith("dsv4")]
    return "\n".join([
        f"On one {forward['machine']['gpu']}, the time of a call in a CUDA graph divided by the "
        "time of the engine's own, from the plugin's worst ratio to its best (below 1 the plugin "
        "is faster):",
        "",
        f"- {forward['version']}'s `forward_c4_indexer` (`benchmarks/results/{SGLANG}`): "
        + "; ".join(f"`{name}` {_span(cells, name, [OFF])}" for name in _variants(cells)) + f". "
        f"{_checked(forward)} Its top-k alone against `{newest}` (`{ADAPTERS}`): "
        + "; ".join(
            f"{name.removeprefix('dsv4 ')} {_span(alone, name, [newest])}"
            for name in ("dsv4 bfloat16", "dsv4 float32")
        ) + ".",
        f"- TokenSpeed's kernels by `--part kernels`, {len(scored)} cells: "
        + "; ".join(
            f"{name.removeprefix('dsv4 ')} {_span(scored, name, peers)}"
            for name in _names(scored) if name.startswith("dsv4")
        ) + ". The plugin scores queries that are rounded to FP8, TokenSpeed's kernels do not "
        "round them: the plugin's recall is at least "
        f"{min(_recalls(scored, [n for n in _names(scored) if n not in peers])):.3f} on average "
        f"over the rows of a cell.{_missing(adapters, 'tokenspeed')} Its facades (`{TOKENSPEED}`): "
        f"{_results(driver)}.{_missing(driver)}",
    ])  # fmt: skip


def _head(document: Any, name: str) -> str:
    about = document["machine"]
    return f"On one {about['gpu']} (`benchmarks/results/{name}`, of commit {about['commit'][:7]})."


def _forward(document: Any) -> Cells:
    """Return the timed parts of a driver's file by variant."""
    cells: Cells = {}
    for row in document["results"]:
        variant = row["variant"].replace(" own", " plugin")  # as older files have it
        timed = row.get("us") is not None and variant in (OFF, *VARIANTS)
        if timed and not row["part"].startswith("read"):
            cells.setdefault(row["part"].replace(" k512", ""), {})[variant] = row
    return cells


def _default(cells: Cells) -> Cells:
    """Return the calls as SGLang makes them by default: with its newer top-k."""
    return {name: row for name, row in cells.items() if not name.endswith(" v1")}


def _variants(cells: Cells) -> list[str]:
    """Return the variants with the plugin that a file has; older files have no ``auto``."""
    return [name for name in VARIANTS if any(name in row for row in cells.values())]


def _least(cells: Cells, variant: str) -> str:
    found = [row[variant]["agreement_worst"] for row in cells.values()
             if "agreement_worst" in row.get(variant, {})]  # fmt: skip
    return f"{min(found):.4f}" if found else "–"


def _reader(document: Any) -> list[str]:
    """Return a line on the function that replaces TokenSpeed's reader, which cannot be captured."""
    shown = [
        f"{_us(row)} {'without the plugin' if row['variant'] == OFF else 'with it'}"
        for row in document["results"]
        if row["part"].startswith("read ")
    ]
    return [f"- The reader of the FP8 cache, µs: {', '.join(shown)}."] if shown else []


def _cells(document: Any, suite: str) -> Cells:
    """Return the cells of one engine in ``--part kernels`` by implementation."""
    cells: Cells = {}
    for row in document["results"]:
        if row["suite"] == suite and row["k"] in (512, None):
            name = f"`{row['call']}` {row['rows']} x {row['columns']}"
            implementation = row["implementation"].replace(" own logits", " plugin logits")
            cells.setdefault(name, {})[implementation] = row
    calls = list(CALLS[suite])
    return dict(sorted(cells.items(), key=lambda item: calls.index(item[0].split("`")[1])))


def _selections(cells: Cells) -> Cells:
    """Return the calls that select, without those that read the cache."""
    return {name: row for name, row in cells.items() if next(iter(row.values()))["k"]}


def _names(cells: Cells) -> list[str]:
    return list(dict.fromkeys(name for row in cells.values() for name in row))


def _table(
    first: str,
    cells: Cells,
    columns: list[str],
    titles: dict[str, str],
    last: tuple[str, Callable[[dict[str, Row]], str]] | None = None,
) -> list[str]:
    """Return a table; a missing figure is a dash, a wrong answer has a mark."""
    heads = [first, *(titles.get(c, c) for c in columns), *([last[0]] if last else [])]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, row in cells.items():
        shown = [_us(row.get(column)) for column in columns]
        lines.append(" | ".join([f"| {name}", *shown, *([last[1](row)] if last else [])]) + " |")
    return lines


def _us(row: Row | None) -> str:
    if row is None or row["us"] is None:
        return "–"
    eager = "" if row["graph"] else " eager"
    return f"{row['us']:.1f}{eager}{'' if _sound(row) else ' WRONG'}"


def _sound(row: Row) -> bool:
    return all(row.get(name, True) for name in ("right", "exact", "lowest_index"))


def _agreement(row: Row | None) -> str:
    if row is None or "agreement" not in row:
        return "–"
    return f"{row['agreement']:.4f}, {row['agreement_worst']:.4f}"


def _ratios(cells: Cells, one: str, others: Iterable[str]) -> dict[str, float]:
    """Compare an implementation with the fastest of others, in the cells where both were right."""
    found = {}
    for name, row in cells.items():
        bars = [row[t]["us"] for t in others if t in row and row[t]["us"] and _sound(row[t])]
        if bars and one in row and row[one]["us"] and _sound(row[one]):
            found[name] = row[one]["us"] / min(bars)
    return found


def _against(cells: Cells, one: str, others: list[str], what: str) -> str:
    ratios = _ratios(cells, one, others)
    if not ratios:
        return f"- {one} beside {what}: not measured."
    slower = sum(r > 1 for r in ratios.values())
    worst, best = (pick(ratios, key=ratios.__getitem__) for pick in (max, min))
    return (
        f"- {one} beside {what}: slower in {slower} of {len(ratios)}, the ratio from "
        f"{ratios[worst]:.2f} ({worst}) to {ratios[best]:.2f} ({best})."
    )


def _span(cells: Cells, one: str, others: list[str]) -> str:
    ratios = _ratios(cells, one, others).values()
    if not ratios:
        return "not measured"
    slower = sum(r > 1 for r in ratios)
    return f"{max(ratios):.2f} – {min(ratios):.2f}, slower in {slower} of {len(ratios)}"


def _recalls(cells: Cells, names: list[str]) -> list[float]:
    return [r["recall"] for row in cells.values() for n, r in row.items()
            if n in names and "recall" in r] or [0.0]  # fmt: skip


def _results(document: Any) -> str:
    rows = document["results"]
    wrong = sum(row.get("right") is False for row in rows)
    return f"{len(rows)} results, {wrong} wrong, {len(document['failed'])} failed"


def _checked(document: Any) -> str:
    return f"Every answer is checked, and compared with its replay: {_results(document)}."


def _missing(document: Any, suite: str | None = None) -> str:
    """Name what is missing in an incomplete file; return nothing for a complete one."""
    if document["complete"]:
        return ""
    if "not_run" in document:
        names = [name for name in document["not_run"] if suite is None or name.startswith(suite)]
    elif suite is None:  # older files without `not_run`
        rows = document["results"]
        seen = {row["variant"].replace(" own", " plugin") for row in rows}
        names = [v for v in VARIANTS if v not in seen and v != "auto"]
        names = [f"the plugin ({', '.join(names)})"] if names else []
        names += [kind for kind in ("prefill", "read")
                  if not any(row["part"].startswith(kind) for row in rows)]  # fmt: skip
        names.append(f"decode after {rows[-1]['part'].split(' ')[1]}")
    else:
        rows = [row for row in document["results"] if row["suite"] == suite]
        names = [f"`{c}`" for c in CALLS[suite] if all(row["call"] != c for row in rows)]
        if names:  # the run ended within this engine's calls
            at = rows[-1]
            names.insert(0, f"`{at['call']}` after {at['rows']} x {at['columns']}")
    if not names:
        return " **Incomplete:** the run was stopped, but none of these calls is missing."
    return f" **Incomplete:** the run was stopped; missing: {', '.join(names)}."
