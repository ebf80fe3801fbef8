"""Bad input of the candidate ops: an error that names the argument, and nothing is written."""

from __future__ import annotations

import inspect

import pytest
import torch
from kits.candidate_cases import draw

import dsv4_plugin
from dsv4_plugin.errors import UnmetError

ROWS, K, COLUMNS = 4, 5, 40


def int32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


CASE = draw([192, 64, 5, 0], 2, heads=3)
PAGED = dict(zip(("q", "cache", "weights", "lengths", "block_table"), CASE.arguments, strict=True))
CHOSEN = int32(ROWS, K)
CHOSEN_TOO = int32(ROWS, 8)
RAGGED = {
    "q": CASE.q.flatten(0, 1),
    "k": torch.zeros(9, 128, dtype=torch.uint8),
    "k_scale": torch.ones(9),
    "weights": CASE.weights,
    "candidates": CHOSEN,
    "row_starts": int32(ROWS),
    "row_ends": int32(ROWS),
}
GOOD = {
    "block_maxima": PAGED,
    "select_blocks": {"maxima": torch.zeros(ROWS, 24), "lengths": CASE.lengths, "k": K},
    "candidate_logits": PAGED | {"candidates": CHOSEN},
    "candidate_logits_ragged": RAGGED,
    "candidate_select": PAGED | {"candidates": CHOSEN, "k": 8},
    "select_candidates": {
        "logits": torch.zeros(ROWS, COLUMNS), "candidates": CHOSEN, "lengths": CASE.lengths, "k": 8,
    },
}  # fmt: skip

TABLE = CASE.table
ON_PAGES = [
    ({"q": CASE.q.float()}, TypeError, r"\bq\b.*float8_e4m3fn.*float32"),
    ({"q": CASE.q[0, 0]}, ValueError, r"\bq\b.*3 or 4 dimensions"),
    ({"q": CASE.q.transpose(2, 3)}, ValueError, r"\bq\b.*contiguous"),
    ({"q": None}, TypeError, r"\bq\b.*NoneType"),
    ({"cache": CASE.cache.int()}, TypeError, "cache.*uint8.*int32"),
    ({"cache": CASE.cache[:, :8000]}, ValueError, "cache.*8448.*8000"),
    ({"block_size": 32, "cache": CASE.cache[:, :4000]}, ValueError, "cache.*4224.*4000"),
    ({"block_size": 0}, ValueError, "block_size.*at least 1.*0"),
    ({"block_size": 64.0}, TypeError, "block_size.*int.*float"),
    ({"weights": CASE.weights.double()}, TypeError, "weights.*float32.*float64"),
    ({"weights": CASE.weights[:3]}, ValueError, r"weights.*\[4, 3\].*\(3, 3\)"),
    ({"lengths": CASE.lengths.float()}, TypeError, "lengths.*int32.*float32"),
    ({"lengths": CASE.lengths[:3]}, ValueError, r"lengths.*\[4\].*\(3,\)"),
    ({"block_table": TABLE.long()}, TypeError, "block_table.*int32.*int64"),
    ({"block_table": int32(3, 3)}, ValueError, r"block_table.*2 rows.*\(3, 3\)"),
    ({"block_table": int32(2, 6)[:, ::2]}, ValueError, "block_table.*unit stride"),
]
PIECE = [
    ({"piece": 0}, ValueError, "piece.*1 to .*0"),
    ({"piece": True}, TypeError, "piece.*int.*bool"),
    ({"backend": "triton"}, UnmetError, "no triton implementation"),
    ({"backend": "cuda"}, UnmetError, "on cpu, not on a CUDA device"),
    ({"backend": "rocm"}, UnmetError, "'rocm' is no backend"),
    ({"backend": "cuda", "piece": 16}, UnmetError, "piece is 16, the kernels need 8"),
]
DTYPE = [({"dtype": torch.float64}, ValueError, "dtype.*bfloat16.*float64")]
CANDIDATES = [
    ({"candidates": CHOSEN.long()}, TypeError, "candidates.*int32.*int64"),
    ({"candidates": CHOSEN[0]}, ValueError, "candidates.*2 dimensions"),
    ({"candidates": CHOSEN[:2]}, ValueError, r"candidates.*\[4, K\].*\(2, 5\)"),
    ({"candidates": CHOSEN[:, :0]}, ValueError, r"candidates.*at least 1.*\(4, 0\)"),
    ({"candidates": int32(ROWS, 2 * K)[:, ::2]}, ValueError, "candidates.*unit stride"),
    ({"candidates": None}, TypeError, "candidates.*NoneType"),
]
SCORES_OUT = [
    ({"out": torch.zeros(ROWS, COLUMNS - 1)}, ValueError, r"\bout\b.*\(4, 40\).*\(4, 39\)"),
    ({"out": torch.zeros(3, COLUMNS)}, ValueError, r"\bout\b.*\(4, 40\).*\(3, 40\)"),
    ({"out": torch.zeros(ROWS, COLUMNS).double()}, TypeError, r"\bout\b.*float64"),
    ({"out": torch.zeros(COLUMNS, ROWS).t()}, ValueError, r"\bout\b.*unit stride"),
    ({"out": torch.zeros(COLUMNS).expand(ROWS, -1)}, ValueError, r"\bout\b.*overlap"),
    ({"out_lengths": int32(3)}, ValueError, r"out_lengths.*\(4,\).*\(3,\)"),
    ({"out_lengths": int32(ROWS).long()}, TypeError, "out_lengths.*int32.*int64"),
    ({"out_lengths": int32(8)[::2]}, ValueError, "out_lengths.*contiguous"),
]
SELECTED = [
    ({"k": 0}, ValueError, r"\bk\b.*1 to 2048.*0"),
    ({"k": 2049}, ValueError, r"\bk\b.*1 to 2048.*2049"),
    ({"k": 2.0}, TypeError, r"\bk\b.*int.*float"),
    ({"next_n": 3}, ValueError, "next_n.*3.*4"),
    ({"next_n": 0}, ValueError, "next_n.*1 to .*0"),
    ({"lengths": CASE.lengths.float()}, TypeError, "lengths.*float32"),
    ({"lengths": CASE.lengths[:3]}, ValueError, r"lengths.*\[4\].*\(3,\)"),
    ({"out": int32(ROWS, 3)}, ValueError, r"\bout\b.*\(4, 3\)"),
    ({"out": torch.zeros(ROWS, 8)}, TypeError, r"\bout\b.*int32.*float32"),
    ({"out_counts": int32(3)}, ValueError, r"out_counts.*\(4,\).*\(3,\)"),
    ({"out_counts": torch.zeros(ROWS)}, TypeError, "out_counts.*int32.*float32"),
    ({"out_counts": int32(8)[::2]}, ValueError, "out_counts.*contiguous"),
]
BAD = {
    "block_maxima": [
        *ON_PAGES, *PIECE, *DTYPE,
        ({"backend": "cuda"}, UnmetError, "q has 3 heads, the kernels need 32 or 64"),
        ({"backend": "cuda", "block_size": 16}, UnmetError, "block_size is 16.*32 or 64"),
        ({"out": torch.zeros(3, 24)}, ValueError, r"\bout\b.*\(4, 24\).*\(3, 24\)"),
        ({"out": torch.zeros(ROWS, 24).double()}, TypeError, r"\bout\b.*float64"),
        ({"out": torch.zeros(24).expand(ROWS, -1)}, ValueError, r"\bout\b.*overlap"),
        ({"out": torch.zeros(ROWS)}, ValueError, r"\bout\b.*2 dimensions"),
        ({"logits": torch.zeros(3, 192)}, ValueError, r"logits.*\(4, 192\).*\(3, 192\)"),
        ({"logits": int32(ROWS, 192)}, TypeError, "logits.*int32"),
        ({"logits": torch.zeros(192, ROWS).t()}, ValueError, "logits.*unit stride"),
        ({"logits": torch.zeros(192).expand(ROWS, -1)}, ValueError, "logits.*overlap"),
        ({"logits": 3}, TypeError, "logits.*Tensor.*int"),
        (
            {"logits": torch.zeros(ROWS, 192), "out": torch.zeros(ROWS, 24).half()},
            ValueError, "logits.*float16.*float32",
        ),
    ],
    "select_blocks": [
        *SELECTED, *PIECE,
        ({"maxima": torch.zeros(ROWS, 24).double()}, TypeError, "maxima.*float64"),
        ({"maxima": torch.zeros(ROWS)}, ValueError, "maxima.*2 dimensions"),
        ({"maxima": torch.zeros(24, ROWS).t()}, ValueError, "maxima.*unit stride"),
    ],
    "candidate_logits": [
        *ON_PAGES, *PIECE, *DTYPE, *CANDIDATES, *SCORES_OUT,
        ({"backend": "cuda"}, UnmetError, "q has 3 heads, the kernels need 32 or 64"),
        ({"backend": "cuda", "block_size": 16}, UnmetError, "block_size is 16.*32 or 64"),
        (
            {"backend": "cuda", "candidates": int32(ROWS, 2049)}, UnmetError,
            "2049 candidates, more than 2048",
        ),
    ],
    "candidate_logits_ragged": [
        *PIECE, *DTYPE, *CANDIDATES, *SCORES_OUT,
        ({"backend": "cuda"}, UnmetError, "q has 3 heads, the kernels need 32 or 64"),
        ({"q": CASE.q}, ValueError, r"\bq\b.*3 dimensions"),
        ({"k": torch.zeros(9, 64, dtype=torch.uint8)}, ValueError, r"\bk\b.*128.*\(9, 64\)"),
        ({"k": torch.zeros(9, 128)}, TypeError, r"\bk\b.*float32"),
        ({"k_scale": torch.ones(8)}, ValueError, r"k_scale.*\[9\].*\(8,\)"),
        ({"k_scale": torch.ones(9).half()}, TypeError, "k_scale.*float16"),
        ({"weights": CASE.weights[:, :2]}, ValueError, r"weights.*\[4, 3\].*\(4, 2\)"),
        ({"row_starts": int32(3)}, ValueError, r"row_starts.*\[4\].*\(3,\)"),
        ({"row_starts": torch.zeros(ROWS)}, TypeError, "row_starts.*float32"),
        ({"row_ends": int32(8)[::2]}, ValueError, "row_ends.*contiguous"),
    ],
    "candidate_select": [
        *ON_PAGES, *PIECE, *DTYPE, *CANDIDATES,
        *(case for case in SELECTED if not {"next_n", "lengths"} & set(case[0])),
        ({"backend": "cuda"}, UnmetError, "q has 3 heads, the kernels need 32 or 64"),
        ({"backend": "cuda", "block_size": 16}, UnmetError, "block_size is 16.*32 or 64"),
        (
            {"backend": "cuda", "candidates": int32(ROWS, 2049)}, UnmetError,
            "2049 candidates, more than 2048",
        ),
        ({"page_table": int32(3, 3)}, ValueError, r"page_table.*4 rows.*\(3, 3\)"),
        ({"page_table": TABLE.long()}, TypeError, "page_table.*int32.*int64"),
        ({"page_size": 0}, ValueError, "page_size.*1 to .*0"),
        ({"out_slots": int32(ROWS, 8)}, ValueError, "out_slots needs page_table"),
        (
            {"out_slots": int32(ROWS, 7), "page_table": int32(ROWS, 3)}, ValueError,
            r"out_slots.*\(4, 8\).*\(4, 7\)",
        ),
        ({"out": CHOSEN_TOO, "candidates": CHOSEN_TOO}, ValueError, "out.*candidates"),
    ],
    "select_candidates": [
        *SELECTED, *PIECE[:-1], *CANDIDATES,
        (
            {"backend": "cuda", "piece": 4, "logits": torch.zeros(ROWS, 20)}, UnmetError,
            "piece is 4, the kernels need 8",
        ),
        ({"logits": torch.zeros(ROWS, COLUMNS).double()}, TypeError, "logits.*float64"),
        ({"logits": torch.zeros(ROWS, 41)}, ValueError, "logits.*5 · 8 columns.*41"),
        ({"logits": torch.zeros(COLUMNS, ROWS).t()}, ValueError, "logits.*unit stride"),
        ({"block_table": int32(3, 3)}, ValueError, r"block_table.*4 rows.*\(3, 3\)"),
        ({"block_table": TABLE.long()}, TypeError, "block_table.*int32.*int64"),
        ({"page_size": 0}, ValueError, "page_size.*1 to .*0"),
        ({"out_slots": int32(ROWS, 8)}, ValueError, "out_slots needs block_table"),
        (
            {"out_slots": int32(ROWS, 7), "block_table": int32(ROWS, 3)}, ValueError,
            r"out_slots.*\(4, 8\).*\(4, 7\)",
        ),
        (
            {"out_slots": torch.zeros(ROWS, 8), "block_table": int32(ROWS, 3)}, TypeError,
            "out_slots.*int32.*float32",
        ),
    ],
}  # fmt: skip
CASES = [
    pytest.param(name, *case, id=f"{name}-{at}-{'-'.join(case[0])}")
    for name, cases in BAD.items()
    for at, case in enumerate(cases)
]


@pytest.mark.parametrize(("name", "change", "error", "words"), CASES)
def test_bad_input(name, change, error, words):
    outputs = [x for key, x in change.items() if key.startswith("out") and torch.is_tensor(x)]
    before = [x.clone() for x in outputs]
    with pytest.raises(error, match=words):
        getattr(dsv4_plugin, name)(**GOOD[name] | change)
    assert all(torch.equal(a, b) for a, b in zip(outputs, before, strict=True))


@pytest.mark.parametrize("name", GOOD)
def test_good_input_is_good(name):
    """What the cases above change is otherwise in order, and every argument has a case."""
    function = getattr(dsv4_plugin, name)
    function(**GOOD[name])
    parameters = set(inspect.signature(function).parameters)
    assert parameters == {key for change, _, _ in BAD[name] for key in change}
