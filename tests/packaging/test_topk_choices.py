"""The top-k's table of choices on devices of several sizes, compiled and run without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from kits.packaging_tools import check, compiled

from benchmarks.tuning.choice_sweep import SOLO, UNITS_A_THREAD


class Choice(NamedTuple):
    sms: int
    largest: int  # CTAs of a cluster that the device holds
    type: int
    k: int
    rows: int
    columns: int  # whole units
    threads: int
    cluster: int
    held: int
    solo: int
    guesses: int  # of the threshold
    guesses_candidates: int  # the same call with the columns of candidates


@pytest.fixture(scope="module")
def choices(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> list[Choice]:
    return list(read(compiled(nvcc, "topk_choices", tmp_path_factory.mktemp("choices"))))


def read(program: Path) -> Iterator[Choice]:
    for line in check([program], program.parent).stdout.splitlines():
        yield Choice(*(int(word) for word in line.replace("|", "").split()))


def test_an_even_share_fits_and_one_cta_more_does_not(nvcc: str, tmp_path: Path) -> None:
    program = compiled(nvcc, "topk_share", tmp_path)
    lines = check([program], tmp_path).stdout.splitlines()
    assert len(lines) == 21
    for line in lines:
        whole, reserved, most, share, size = (int(word) for word in line.split())
        taken = -(-(size + reserved) // 128) * 128  # given out in pieces of 128 bytes
        assert 0 < size <= most and share * taken <= whole < (share + 1) * taken, line


def test_every_row_fits(choices: list[Choice]) -> None:
    assert len(choices) > 300_000
    for c in choices:
        capacity = c.threads * UNITS_A_THREAD * 8
        if c.threads == 1024:  # the wide kernel, for what nothing else holds
            assert c.cluster == 1 and c.columns > 512 * UNITS_A_THREAD * 8 * c.largest, c
        else:
            assert 1 <= c.cluster <= c.largest and c.columns <= capacity * c.cluster, c


def test_a_small_call_runs_at_once(choices: list[Choice]) -> None:
    """Two CTAs of 512 threads fit a multiprocessor, four of 256."""
    for c in choices:
        smallest = -(-c.columns // (512 * UNITS_A_THREAD * 8))  # what the row needs in any case
        if c.threads != 1024 and c.rows <= c.sms and c.cluster > smallest:
            assert c.rows * c.cluster * c.threads <= 1024 * c.sms, c


def test_the_registers_of_a_cta_hold_what_it_serves_alone(choices: list[Choice]) -> None:
    """A short row of a wide buffer is one CTA's: listed, it takes twice as long."""
    for c in choices:
        if c.cluster > 1:
            assert c.solo <= c.held, c


def test_the_sweep_knows_what_one_cta_serves_alone(choices: list[Choice]) -> None:
    assert all(c.solo == SOLO[c.threads] for c in choices)


def test_a_guess_is_for_large_k_of_float32_rows_of_one_cta(choices: list[Choice]) -> None:
    guessed = [c for c in choices if c.guesses]
    assert {c.sms for c in guessed} == {78, 114, 132}
    for c in guessed:
        assert (c.type, c.cluster, c.threads) == (2, 1, 512) and c.k > 512, c
        assert 2 * c.rows > c.sms and c.columns > c.held, c


def test_candidates_have_no_guess(choices: list[Choice]) -> None:
    """No kernel of theirs guesses."""
    assert not any(c.guesses_candidates for c in choices)


def test_all_choices_are_taken(choices: list[Choice]) -> None:
    taken = {(c.threads, c.cluster) for c in choices if c.sms == 132 and c.largest == 16}
    assert {512, 256, 1024} == {threads for threads, _ in taken}
    assert {1, 2, 4, 6, 8, 16} <= {cluster for _, cluster in taken}
