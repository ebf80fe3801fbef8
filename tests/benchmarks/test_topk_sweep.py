"""The sweep behind the table of choices, in the parts that need no GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.server.trace import Kernel
from benchmarks.tuning import choice_sweep as sweep
from benchmarks.tuning import sweep as sweep_command
from benchmarks.tuning.behind import after_logits, kernels


def test_every_choice_holds_the_row() -> None:
    for columns in (8192, 262_144, 1_000_000, 4_194_304):
        for threads, cluster, _ in sweep.choices(1, columns, sms=132):
            assert threads * sweep.UNITS_A_THREAD * 8 * cluster >= columns
    assert (512, 1, 8192) in sweep.choices(1, 262_144, sms=132)
    assert (512, 1, 8192) not in sweep.choices(1, 262_145, sms=132)
    assert (256, 1, 8192) not in sweep.choices(1, 262_144, sms=132)
    assert not list(sweep.choices(1, 4_194_305, sms=132))


def test_a_guess_is_one_cta_a_row() -> None:
    guess = (sweep.GUESS, 1, 8192)
    assert guess in sweep.choices(100, 262_144, sms=132, guesses=True)
    assert guess not in sweep.choices(100, 262_145, sms=132, guesses=True)
    assert guess not in sweep.choices(100, 262_144, sms=132)


def test_a_large_call_has_no_more_ctas_than_fit() -> None:
    for rows in (1, 32, 128, 1000):
        for _, cluster, _ in sweep.choices(rows, 8192, sms=78):
            assert cluster == 1 or rows * cluster <= 156
    assert {c for _, c, _ in sweep.choices(1, 8192, sms=78)} == set(sweep.CLUSTERS)
    assert {c for _, c, _ in sweep.choices(1000, 8192, sms=78)} == {1}


def test_what_a_cta_serves_alone_is_for_clusters() -> None:
    tried = list(sweep.choices(1, 8192, sms=132, solos=(4096, 8192)))
    assert {solo for _, cluster, solo in tried if cluster == 1} == {4096}
    assert {solo for _, cluster, solo in tried if cluster == 8} == {4096, 8192}


def test_the_summary_has_the_best_choices_and_the_tables() -> None:
    def row(threads: object, cluster: object, warm: float, served: float) -> sweep.Row:
        return {"threads": threads, "cluster": cluster, "solo": sweep.SOLO.get(threads),
                "warm_us": warm, "served_us": served, "exact": True}  # fmt: skip

    rows = [row("table", "table", 4.0, 6.0), row(256, 4, 4.1, 5.5), row(512, 8, 3.9, 7.0)]
    said = sweep.summary(rows)
    assert said == ("warm: table 4.00; 8 x 512 3.90, 4 x 256 4.10  |  "
                    "served: table 6.00; 4 x 256 5.50, 8 x 512 7.00")  # fmt: skip
    rows[2]["solo"] = 4096
    assert "8 x 512 solo 4096 3.90" in sweep.summary(rows)
    rows[2]["exact"] = False
    assert sweep.summary(rows).endswith("NOT EXACT: 1")


def kernel(name: str, start: float, end: float) -> Kernel:
    return Kernel(name, start, end - start, 7)


def test_what_counts_is_from_the_end_of_the_logits() -> None:
    ran = [
        kernel("void dsv4::topk_kernel<other>", 0.0, 4.0),
        kernel("void dsv4::paged_logits_kernel<bf16>", 5.0, 9.0),
        kernel("void dsv4::topk_kernel<bf16>", 8.0, 13.5),  # began before they ended
        kernel("void at::native::fill", 14.0, 90.0),
        kernel("void dsv4::paged_logits_kernel<bf16>", 91.0, 95.0),
        kernel("void dsv4::topk_wide_kernel<bf16>", 95.5, 99.0),
    ]
    assert after_logits(ran) == [4.5, 4.0]


def test_what_the_profiler_saw_is_in_order() -> None:
    x = torch.ones(1000)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        (x * 2).sum()
    seen = kernels(profiler, torch.autograd.DeviceType.CPU)
    names = [kernel.name for kernel in seen]
    assert names.index("aten::mul") < names.index("aten::sum")
    assert [k.start for k in seen] == sorted(k.start for k in seen)
    assert all(k.duration > 0 for k in seen if k.name.startswith("aten::"))
    assert kernels(profiler, torch.autograd.DeviceType.CUDA) == []


@pytest.mark.parametrize("last", [None, "void dsv4::paged_logits_kernel<bf16>"])
def test_logits_without_a_selection_are_an_error(last: str | None) -> None:
    ran = [kernel("void dsv4::paged_logits_kernel<bf16>", 5.0, 9.0)]
    ran += [kernel(last, 10.0, 11.0)] if last else []
    with pytest.raises(RuntimeError, match="behind logits ran"):
        after_logits(ran)


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert sweep_command.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
