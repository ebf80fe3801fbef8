"""The division of a prefill's rows into parts, for DeepSeek-V4.1."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4_plugin.engines.sglang.v41_rows import Part, Run, parts_of

requests = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), max_size=8)


@given(requests, st.integers(1, 400), st.integers(0, 60))
def test_every_row_is_in_one_part_within_the_bound(calls, most, whole):
    counts, keys = [n for n, _ in calls], [k for _, k in calls]
    parts = list(parts_of(counts, keys, most, whole))
    at = 0
    for part in parts:
        assert part.columns == max(keys[run.request] for run in part.runs)
        rows = part.rows.stop - part.rows.start
        assert rows == 1 or rows * part.columns <= most
        assert len({keys[run.request] <= whole for run in part.runs}) == 1
        for run in part.runs:
            assert run.begin == at < run.end
            first = sum(counts[: run.request])
            assert first <= run.begin and run.end <= first + counts[run.request]
            at = run.end
    assert at == sum(counts)


@pytest.mark.parametrize(
    ("counts", "keys", "most", "whole", "expected"),
    [
        ([8], [100], 250, 10, [(0, 2), (2, 4), (4, 6), (6, 8)]),
        ([5, 3], [10, 10], 80, 16, [(0, 8)]),
        ([5, 3], [10, 20], 1000, 16, [(0, 5), (5, 8)]),  # the first sees all blocks
        ([5, 3], [10, 10], 79, 16, [(0, 5), (5, 8)]),  # a request is not cut for another
        ([0, 2, 0], [5, 5, 5], 10, 0, [(0, 2)]),
        ([], [], 10, 0, []),
    ],
)
def test_parts(counts, keys, most, whole, expected):
    parts = list(parts_of(counts, keys, most, whole))
    assert [(part.rows.start, part.rows.stop) for part in parts] == expected


def test_a_part_knows_its_rows():
    part = Part((Run(0, 3, 5), Run(2, 5, 6)), 7)
    assert part.rows == slice(3, 6)
