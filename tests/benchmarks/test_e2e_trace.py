"""The reduction of a profiler trace, on traces small enough to add up by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.server import trace

FILL = "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>, …>"
LOGITS = "void deep_gemm::sm90_fp8_paged_mqa_logits<1u, 64u, 128u, …>"
COOPERATIVE = "void vllm::cooperative_topk_kernel<512>(…)"
PLUGIN = "void dsv4::topk_kernel<dsv4::TopkConfig<…>>(dsv4::TopkParams, dsv4::TopkPlan)"
TRANSFORM = "_compute_global_topk_indices_and_lens_kernel"
K_WRITE = "_fused_kv_compress_norm_rope_insert_indexer_attn"
GEMM = "void deep_gemm::sm90_fp8_gemm_1d2d<…>"
LAYERS = 2
# name, microseconds; one layer
LAYER = [(K_WRITE, 3.0), (FILL, 1.5), (LOGITS, 4.0), (COOPERATIVE, 10.0), (TRANSFORM, 2.0)]


def events(layer: list[tuple[str, float]], steps: int, gap: float = 1.0) -> list[dict[str, Any]]:
    """Steps of LAYERS layers and a GEMM of 20 µs after each; kernels are ``gap`` apart."""
    return steps_of([*layer, (GEMM, 20.0)] * LAYERS, steps, gap)


def steps_of(step: list[tuple[str, float]], steps: int, gap: float = 1.0) -> list[dict[str, Any]]:
    """Steps of these kernels, ``gap`` apart."""
    found: list[dict[str, Any]] = []
    now = 1000.0
    for _ in range(steps):
        found.append({"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": now, "dur": 5.0})
        for name, dur in step:
            args = {"stream": 7}
            found.append({"cat": "kernel", "name": name, "ts": now, "dur": dur, "args": args})
            now += dur + gap
    return found


def test_each_part_is_summed_over_a_step() -> None:
    found = trace.reduce(events(LAYER, 6), LAYERS)
    assert found["steps"] == 5
    parts = {name: found["parts"][name]["us"] for name in trace.PARTS}
    of_v4 = {"k_write": 6, "fill": 3, "logits": 8, "topk": 20, "transform": 4}
    assert parts == {**of_v4, "maxima": 0, "blocks": 0, "candidates": 0}
    assert {found["parts"][name]["calls"] for name in of_v4} == {LAYERS}
    assert found["chain_us"] == 41 and found["chain_us_layer"] == 20.5
    assert found["step_us"] == 2 * (20.5 + 20 + 6)
    assert found["busy_us"] == 2 * 40.5
    assert found["kernels"] == 12
    assert found["host_launches"] == {"cudaGraphLaunch": 1.0}
    assert found["logits_to_topk_us"] == 15.0  # 4 + 10, and the gap between the two
    assert found["top"][0] == {"kernel": GEMM, "us": 40.0, "calls": 2.0}


def test_the_plugins_kernels_count_as_the_same_part() -> None:
    layer = [(PLUGIN if name == COOPERATIVE else name, dur) for name, dur in LAYER if name != FILL]
    found = trace.reduce(events(layer, 5), LAYERS)
    assert found["parts"]["topk"] == {
        "us": 20.0, "calls": 2.0, "us_call": 10.0, "kernels": [PLUGIN],
    }  # fmt: skip
    assert found["parts"]["fill"] == {"us": 0, "calls": 0.0, "us_call": None, "kernels": []}
    assert found["parts"]["logits"]["calls"] == 2


# DeepSeek-V4.1: a layer of ratio 2, the source of the candidates, a consumer.
K_STORE = "_indexer_k_norm_rope_quant_store_kernel"
SORT = "void at::native::sbtopk::gatherTopK<float, …>"
V41_UPSTREAM = [
    (K_STORE, 2.0), (FILL, 1.0), (LOGITS, 4.0), (COOPERATIVE, 5.0), (TRANSFORM, 1.0),
    (K_STORE, 2.0), (FILL, 1.0), (LOGITS, 6.0), ("_block_scores_kernel", 7.0), (SORT, 60.0),
    ("void cub::DeviceRadixSort…", 9.0), ("_store_candidates_kernel", 2.0), (COOPERATIVE, 5.0),
    (TRANSFORM, 1.0),
    (FILL, 1.0), (LOGITS, 6.0), ("_candidate_flags_kernel", 3.0), ("_mask_candidates_kernel", 8.0),
    (COOPERATIVE, 5.0), (TRANSFORM, 1.0),
]  # fmt: skip
CANDIDATES = "void dsv4::candidate_logits_kernel<dsv4::…>(…)"
V41_PLUGIN = [
    (K_STORE, 2.0), ("void dsv4::paged_logits_kernel<32>(…)", 4.0), (PLUGIN, 5.0), (TRANSFORM, 1.0),
    (K_STORE, 2.0), ("void dsv4::paged_logits_kernel<dsv4::Maxima>(…)", 6.0), (PLUGIN, 3.0),
    (CANDIDATES, 3.5), (PLUGIN, 4.0), (TRANSFORM, 1.0),
    (CANDIDATES, 3.5), (PLUGIN, 4.0), (TRANSFORM, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("step", "us"),
    [
        (V41_UPSTREAM, {"k_write": 4, "fill": 3, "logits": 16, "maxima": 7, "blocks": 71,
                        "candidates": 11, "topk": 15, "transform": 3}),
        (V41_PLUGIN, {"k_write": 4, "fill": 0, "logits": 4, "maxima": 6, "blocks": 3,
                    "candidates": 7, "topk": 13, "transform": 3}),
    ],
)  # fmt: skip
def test_the_parts_of_two_level_selection(step: list[tuple[str, float]], us: dict) -> None:
    found = trace.reduce(steps_of(step, 6), layers=3, writers=2)
    assert found["steps"] == 5
    assert {name: found["parts"][name]["us"] for name in trace.PARTS} == us
    assert found["chain_us_layer"] == round(sum(us.values()) / 3, 3)
    assert found["step_us"] == sum(dur + 1 for _, dur in step)


def test_upstreams_block_scores_in_prefill_begin_no_step() -> None:
    prefill = [(K_STORE, 9.0), ("_block_scores_kernel", 9.0), ("_store_candidates_kernel", 1.0)]
    ran = [trace.Kernel(n, float(i), 1.0, 7) for i, (n, _) in enumerate(prefill + V41_UPSTREAM)]
    marks = trace._marks(ran, trace.classify(ran))
    assert [ran[i].name for i in marks] == [LOGITS, LOGITS]
    assert marks[0] == len(prefill) + 2


def test_what_follows_the_maxima_on_another_stream_is_not_a_selection_of_blocks() -> None:
    names = [("_block_scores_kernel", 7), (GEMM, 8), (SORT, 7), (LOGITS, 7), (GEMM, 7)]
    ran = [trace.Kernel(name, float(i), 1.0, on) for i, (name, on) in enumerate(names)]
    assert trace.classify(ran) == ["maxima", "", "blocks", "logits", ""]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("_dsa_decode_logits_fp8_kernel", "logits"),
        ("_dsa_radix_scatter_kernel", "topk"),
        ("_dsa_logits_topk_kernel", "topk"),
        ("_local_topk_to_global_slots_kernel", "transform"),
        ("void vllm::persistent::persistent_topk_kernel<512, 4u>(…)", "topk"),
        ("void vllm::filtered_topk::FilteredTopKUnifiedKernel<float, int, 1, 512u>", "topk"),
        ("void dsv4::topk_wide_kernel<1024>(dsv4::TopkParams)", "topk"),
        ("void sglang::topk_small_batch_cluster_kernel<false, 16u, 1>(TopKPagedParams)", "topk"),
        ("void sglang::topk_main_kernel<false>(TopKPagedParams)", "topk"),
        ("void sglang::moe_hash_topk_fused<float>(MoEHashTopKParams)", ""),
        ("void sglang::fused_norm_rope_indexer<float, 64>(FusedNormRopeStoreParams)", "k_write"),
        ("void dsv4::paged_logits_kernel<64>(dsv4::LogitsParams)", "logits"),
        ("void deep_gemm::smxx_paged_mqa_logits_metadata<32u, …>", "metadata"),
        ("void deep_gemm::sm90_fp8_mqa_logits<…>", ""),  # prefill
        ("void dsv4::ragged_logits_kernel<64>(dsv4::LogitsParams)", ""),  # prefill
        ("_fused_kv_compress_norm_rope_insert_sparse_attn", ""),  # not the indexer's
        ("_combine_topk_swa_indices_kernel", ""),
        (GEMM, ""),
    ],
)
def test_names(name: str, part: str) -> None:
    assert trace.classify([trace.Kernel(name, 0.0, 1.0, 7)]) == [part]


def test_only_a_fill_right_before_the_logits_is_the_indexers() -> None:
    names = [(FILL, 7), (GEMM, 7), (FILL, 7), (GEMM, 9), (LOGITS, 7), (FILL, 7), (COOPERATIVE, 7)]
    ran = [trace.Kernel(name, float(i), 1.0, on) for i, (name, on) in enumerate(names)]
    assert trace.classify(ran) == ["", "", "fill", "", "logits", "", "topk"]
    without = [kernel for i, kernel in enumerate(ran) if i != 2]
    assert trace.classify(without) == ["", "", "", "logits", "", "topk"], "another's fill"


def test_a_step_with_a_prefill_in_it_is_left_out() -> None:
    found = events(LAYER, 8)
    for event in found:
        if event["ts"] > found[len(found) // 2]["ts"]:
            event["ts"] += 5000
    assert trace.reduce(found, LAYERS)["steps"] == 6
    assert trace.reduce(found, LAYERS)["parts"]["topk"]["us"] == 20


def test_overlapping_kernels_are_busy_once() -> None:
    ran = [trace.Kernel("a", 0.0, 10.0, 7), trace.Kernel("b", 4.0, 2.0, 8)]
    ran += [trace.Kernel("c", 8.0, 4.0, 8), trace.Kernel("d", 20.0, 1.0, 7)]
    assert trace._busy(ran, range(4)) == 13


def test_a_trace_without_decode_steps_says_what_it_has() -> None:
    with pytest.raises(trace.TraceError, match="fewer than four steps of 21 layers.*gemm"):
        trace.reduce(events(LAYER, 2), 21)


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_command(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = tmp_path / f"t{suffix}", tmp_path / "out.json"
    text = json.dumps({"traceEvents": events(LAYER, 6)})
    file.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    command = ["trace", str(file), "--layers", str(LAYERS), "--json", str(out)]
    monkeypatch.setattr("sys.argv", command)
    trace.main()
    assert json.loads(out.read_text())["chain_us"] == 41
