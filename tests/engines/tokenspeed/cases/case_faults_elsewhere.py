"""The faults of docs/faults_elsewhere.md that only this file tests through TokenSpeed's facades."""

from __future__ import annotations

from case_calls import decode, dtypes


@dtypes
def test_ties_go_to_the_lowest_index(engine, load, topk, logits):
    """Keys of zeros: every score is the same, so the first k positions are the answer."""
    load(DSV4_TOPK=topk, DSV4_LOGITS=logits)
    batch = engine.batch((1500, 600))
    batch["plane"].zero_()
    for _ in range(3):
        got, _ = decode(engine, batch)
        assert got.sort(1).values.tolist() == [[*range(512)]] * 2
