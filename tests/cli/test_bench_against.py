"""``bench --against ENGINE``: torch in every suite, missing engines, and the calls of the engines.

Small packages on ``sys.path`` replace the engines and record their calls. The calls must be those
of the releases' own code (the docstrings of ``dsv4_plugin/cli/bench/upstream`` describe them).
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kits.bench_command import bench

from dsv4_plugin.cli.bench import upstream as installed
from dsv4_plugin.cli.bench.command import engines
from dsv4_plugin.cli.bench.logits import cases as logits_cases
from dsv4_plugin.cli.bench.topk.check import judge
from dsv4_plugin.cli.bench.upstream import prepared, torch_peers
from dsv4_plugin.cli.checks import topk_cases as cases
from dsv4_plugin.cli.checks.topk_cases import Problem
from dsv4_plugin.cli.shared.run import UsageError

FORMS = ("decode", "prefill", "paged", "logits", "ragged_logits", "gather")
OTHERS = ("vllm", "sglang", "flashinfer")


# ---- torch, and engines that are not installed ---------------------------------------------------


def test_torch_beside_the_plugin_in_every_suite_of_the_topk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "topk.json"
    assert bench("topk", "--device", "cpu", "--suite", "all", "--against", "torch", "--k", 100,
                 "--json", file) == 0  # fmt: skip
    rows = [r for r in json.loads(file.read_text())["results"] if r["implementation"] == "torch"]
    assert {row["suite"] for row in rows} == set(cases.SUITES)
    assert {row["windows"] for row in rows} == {"full", "causal"}
    assert {row["dtype"] for row in rows} == {"bfloat16", "float32"}
    assert all(row["exact"] for row in rows)
    assert f"torch: exact in {len(rows)} of {len(rows)} cells" in capsys.readouterr().out


def test_torch_beside_the_plugin_in_every_suite_of_the_logits(tmp_path: Path) -> None:
    file = tmp_path / "logits.json"
    assert bench("logits", "--device", "cpu", "--suite", "all", "--against", "torch",
                 "--rows", 2, "--columns", 200, "--json", file) == 0  # fmt: skip
    rows = [r for r in json.loads(file.read_text())["results"] if r["implementation"] == "torch"]
    assert {row["suite"] for row in rows} == set(logits_cases.SUITES)
    assert all(row["right"] for row in rows)


def test_torch_has_a_chain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "chain.json"
    assert bench("chain", "--device", "cpu", "--against", "torch", "--json", file) == 0
    rows = json.loads(file.read_text())["results"]
    peer = [row for row in rows if row["implementation"] == "torch + torch"]
    assert len(peer) == 2 and all(row["exact"] and row["right"] for row in peer)
    assert "not among the peers" not in capsys.readouterr().out


def test_torch_masks_pads_and_counts_from_the_start() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.rand(4, 256, generator=g)
    logits[:, 200:] = torch.nan
    starts = torch.tensor([0, 7, 100, 199], dtype=torch.int32)
    lengths = torch.tensor([200, 150, 5, 0], dtype=torch.int32)
    table = torch.arange(4, dtype=torch.int32).repeat(4, 1)
    for k in (1, 8, 300):
        out = torch.full((4, k), -2, dtype=torch.int32)
        torch_peers.prefill(logits, starts, starts + lengths, k, out)
        assert judge(Problem(logits, lengths, starts), out).why == ""
        for call in (
            torch_peers.decode,
            lambda x, n, k, out: torch_peers.paged(x, n, table, k, out),
        ):
            out.fill_(-2)
            call(logits, lengths, k, out)
            assert judge(Problem(logits, lengths), out).why == ""
    table = torch.tensor([[3, 1, 2, 0]], dtype=torch.int32)
    out = torch.full((1, 4), -2, dtype=torch.int32)
    scores = torch.zeros(1, 256)
    scores[0, [5, 70, 255]] = torch.tensor([3.0, 2.0, 1.0])
    torch_peers.paged(scores, torch.tensor([256], dtype=torch.int32), table, 3, out[:, :3])
    assert sorted(out[0, :3].tolist()) == [63, 70, 197]


def test_who_is_not_installed_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for name in OTHERS:  # tests/vllm is a folder, not an engine
        spec = importlib.util.find_spec(name)
        assert spec is None or spec.origin is None, f"{name} is installed: here it must not be"
    for what in ("topk", "logits", "chain"):
        assert bench(what, "--device", "cpu", "--against", ",".join(OTHERS), "--budget", 0) == 0
        said = capsys.readouterr().out
        for name in OTHERS:
            assert said.count(f"{name} is not compared: it is not installed here") == 1


def test_engines_are_read_with_commas() -> None:
    assert engines("torch,vllm") == ["torch", "vllm"]
    for text, wrong in (("torch,tensorflow", "tensorflow"), ("x.csv", "x.csv"), ("", "")):
        with pytest.raises(UsageError, match=f"vllm, sglang, flashinfer, torch.*got '{wrong}'"):
            engines(text)


# ---- Stand-ins -----------------------------------------------------------------------------------


class Calls(list[tuple[str, tuple[Any, ...], dict[str, Any]]]):
    """What the stand-ins were called with, oldest first."""

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, kwargs) for called, args, kwargs in self if called == name]


class Ops:
    """A namespace of ``torch.ops`` that has its ops once the engine's ops are imported."""

    def __init__(self, record: Any, names: tuple[str, ...]) -> None:
        self._record, self._names = record, names

    def __getattr__(self, name: str) -> Any:
        if name not in self._names or "vllm._custom_ops" not in sys.modules:
            raise AttributeError(name)
        return lambda *args, **kwargs: self._record(name, *args, **kwargs)


FILES = {
    "vllm/__init__.py": "__version__ = '0.33.0'\n",
    "vllm/_custom_ops.py": "",
    "vllm/model_executor/layers/indexer_topk.py": "AUTO_COOPERATIVE_MAX_ROWS = 64\n",
    "vllm/utils/deep_gemm.py": """
import bench_calls
_fp8_fp4_paged_mqa_logits_impl = _fp8_fp4_mqa_logits_impl = None

def _lazy_init():
    global _fp8_fp4_paged_mqa_logits_impl, _fp8_fp4_mqa_logits_impl

    def paged(q, kv, weights, lens, table, schedule, width, clean_logits, logits_dtype):
        return bench_calls.record("paged_impl", q, clean_logits, logits_dtype)

    def dense(q, kv, weights, ks, ke, clean_logits=True, max_seqlen_k=0, logits_dtype=None):
        return bench_calls.record("dense_impl", q, clean_logits, logits_dtype)

    _fp8_fp4_paged_mqa_logits_impl, _fp8_fp4_mqa_logits_impl = paged, dense

def fp8_fp4_paged_mqa_logits(q, kv_cache, weights, context_lens, block_tables, schedule_metadata,
                             max_model_len, indices=None):
    return bench_calls.record("paged", q, kv_cache, weights, context_lens, block_tables,
                              schedule_metadata, max_model_len)

def fp8_fp4_mqa_logits(q, kv, weights, cu_seqlen_ks, cu_seqlen_ke, max_seqlen_k):
    return bench_calls.record("dense", q, kv, weights, cu_seqlen_ks, cu_seqlen_ke, max_seqlen_k)

def get_paged_mqa_logits_metadata(context_lens, block_size, num_sms, indices=None):
    return bench_calls.record("schedule", context_lens, block_size, num_sms)
""",
    "sglang/__init__.py": "__version__ = '0.5.23'\n",
    "sglang/kernels/ops/attention/dsv4/topk.py": """
from typing import Optional
import torch
import bench_calls

def plan_topk_v2(seq_lens, static_threshold=-1, *, out=None):
    return bench_calls.record("plan", seq_lens)

def topk_transform_paged_v2(scores, seq_lens, page_tables: Optional[torch.Tensor],
                            out_page_indices, page_size, metadata, out_raw_indices=None):
    bench_calls.record("v2", scores, seq_lens, page_tables, out_page_indices, page_size, metadata)

def topk_transform_bf16_small(scores, seq_lens, page_table, out_page_indices, page_size):
    bench_calls.record("small", scores, seq_lens, page_table, out_page_indices, page_size)

def topk_transform_ragged_v2(scores, seq_lens, *, out_offsets, out_indices, row_starts=None):
    bench_calls.record("ragged", scores, seq_lens, out_offsets, out_indices, row_starts)
""",
    "deep_gemm.py": """
import bench_calls

def get_paged_mqa_logits_metadata(context_lens, block_kv, num_sms):
    return bench_calls.record("schedule", context_lens, block_kv, num_sms)

def fp8_paged_mqa_logits(*args):
    return bench_calls.record("paged", *args)

def fp8_mqa_logits(*args, **kwargs):
    return bench_calls.record("dense", *args, **kwargs)

def fp8_fp4_paged_mqa_logits(q, kv, w, lens, table, schedule, width, clean_logits, logits_dtype):
    return bench_calls.record("paged_impl", q, clean_logits, logits_dtype)
""",
    "flashinfer.py": """
import bench_calls
__version__ = "0.7.2"

def top_k_ragged_transform(input, offsets, lengths, k, deterministic=False, tie_break=0,
                           dsa_graph_safe=False, row_starts=None):
    return bench_calls.record("ragged", input, offsets, lengths, k, dsa_graph_safe, row_starts)

def top_k_page_table_transform(input, src_page_table, lengths, k, row_to_batch=None,
                               dsa_graph_safe=False, page_size=1, out=None):
    return bench_calls.record("paged", input, src_page_table, lengths, k, dsa_graph_safe,
                              page_size, out)
""",
}  # fmt: skip


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Engines that are installed and that do nothing but say how they were called."""
    for name, text in FILES.items():
        file = tmp_path / "site" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    before = set(sys.modules)
    found = Calls()

    def record(name: str, *args: Any, **kwargs: Any) -> Any:
        found.append((name, args, kwargs))
        if name in ("plan", "schedule"):
            rows = len(args[0]) + 1 if name == "plan" else args[2] + 1
            return torch.full((rows, 2), len(found), dtype=torch.int32)
        if name == "ragged" and len(args) == 6:
            return torch.full((len(args[0]), args[3]), 5, dtype=torch.int32)
        return torch.empty(0)

    module = types.ModuleType("bench_calls")
    module.record = record  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bench_calls", module)
    monkeypatch.syspath_prepend(tmp_path / "site")
    topk_ops = ("cooperative_topk", "persistent_topk", "top_k_per_row_decode",
                "top_k_per_row_prefill")  # fmt: skip
    monkeypatch.setattr(torch.ops, "_C", Ops(record, topk_ops), raising=False)
    gather = Ops(record, ("cp_gather_indexer_k_quant_cache",))
    monkeypatch.setattr(torch.ops, "_C_cache_ops", gather, raising=False)
    yield found
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in (*OTHERS, "deep_gemm"):
            del sys.modules[name]


def kernel(engine: str, form: str, name: str) -> Any:
    found = installed.kernels(engine, form)
    assert callable(found[name]), found
    return found[name]


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Begin or end a capture, as far as the peers can tell."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: on)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: on)

    return switch


def a_call(rows: int, columns: int = 256, k: int = 512, dtype: torch.dtype = torch.float32) -> Any:
    logits = torch.zeros(rows, columns, dtype=dtype)
    lengths = torch.full((rows,), columns, dtype=torch.int32)
    return logits, lengths, torch.full((rows, k), -2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("rows", "k", "op"),
    [(1, 512, "cooperative_topk"), (64, 2048, "cooperative_topk"), (65, 512, "persistent_topk")],
)
def test_vllm_chooses_as_it_does_itself(calls: Calls, rows: int, k: int, op: str) -> None:
    logits, lengths, out = a_call(rows, k=k)
    decode = kernel("vllm", "decode", "vllm 0.33.0")
    decode(logits, lengths, k, out)
    decode(logits, lengths, k, out)
    (first, _), (second, _) = calls.named(op)
    assert all(a is b for a, b in zip(first[:3], (logits, lengths, out), strict=True))
    assert first[3].dtype == torch.uint8 and first[3].numel() == 1 << 20
    assert first[3] is second[3] and first[4:] == (k, 256)


def test_vllm_before_the_module_of_its_limit(calls: Calls, tmp_path: Path) -> None:
    (tmp_path / "site/vllm/model_executor/layers/indexer_topk.py").unlink()
    logits, lengths, out = a_call(33)
    kernel("vllm", "decode", "vllm 0.33.0")(logits, lengths, 512, out)
    assert [name for name, _, _ in calls] == ["persistent_topk"]


def test_vllm_of_another_k_and_another_dtype(calls: Calls) -> None:
    logits, lengths, out = a_call(3, k=100)
    decode = kernel("vllm", "decode", "vllm 0.33.0")
    decode(logits, lengths, 100, out)
    ((args, _),) = calls.named("top_k_per_row_decode")
    assert args[0] is logits and args[1] == 1 and args[2] is lengths and args[3] is out
    assert args[4:] == (3, 256, 1, 100)
    with pytest.raises(ValueError, match="float32 only"):
        decode(logits.bfloat16(), lengths, 100, out)


def test_vllms_prefill_and_gather(calls: Calls) -> None:
    logits, ends, out = a_call(3)
    starts = torch.zeros_like(ends)
    kernel("vllm", "prefill", "vllm 0.33.0 prefill")(logits, starts, ends, 512, out)
    ((args, _),) = calls.named("top_k_per_row_prefill")
    assert all(a is b for a, b in zip(args[:4], (logits, starts, ends, out), strict=True))
    assert args[4:] == (3, 256, 1, 512)
    given = [torch.empty(n) for n in range(1, 6)]  # cache, table, cu, values, scales
    kernel("vllm", "gather", "vllm 0.33.0 cp_gather")(*given)
    ((args, _),) = calls.named("cp_gather_indexer_k_quant_cache")
    assert [len(x) for x in args] == [1, 4, 5, 2, 3]


def keys(next_n: int = 1) -> tuple[torch.Tensor, ...]:
    q = torch.zeros(2, next_n, 64, 128).to(torch.float8_e4m3fn)
    cache = torch.zeros(4, 64, 1, 132, dtype=torch.uint8)
    lengths = torch.full((2, next_n), 100, dtype=torch.int32)
    return q, cache, torch.zeros(2 * next_n, 64), lengths, torch.zeros(2, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("engine", "name"), [("vllm", "vllm 0.33.0 DeepGEMM"), ("sglang", "sglang 0.5.23 DeepGEMM")]
)
def test_deep_gemm_of_both(calls: Calls, capture: Any, engine: str, name: str) -> None:
    """The schedule is made outside of a capture, into memory that stays where it is."""
    q, cache, weights, lengths, table = keys()
    logits = kernel(engine, "logits", name)
    capture(True)
    with pytest.raises(RuntimeError, match="call once eagerly"):
        logits(q, cache, weights, lengths, table, torch.float32)
    capture(False)
    calls.clear()
    logits(q, cache, weights, lengths, table, torch.float32)
    made = calls.named("schedule")
    assert made[0][0][0] is lengths and made[0][0][1:] == (64, 132)
    count = len(made)
    capture(True)
    logits(q, cache, weights, lengths, table, torch.float32)
    capture(False)
    assert len(calls.named("schedule")) == count
    (first, kwargs), (second, _) = calls.named("paged")
    query = first[0][0] if engine == "vllm" else first[0]
    assert query is q and (engine == "sglang" or first[0][1] is None)
    assert all(a is b for a, b in zip(first[1:5], (cache, weights, lengths, table), strict=True))
    assert first[5] is second[5] and first[5].shape == (133, 2)
    assert first[6:] == ((128,) if engine == "vllm" else (128, False)) and kwargs == {}
    logits(q, cache, weights, lengths, table, torch.bfloat16)
    ((args, _),) = calls.named("paged_impl")
    assert args[0][0] is q and args[0][1] is None and args[1:] == (False, torch.bfloat16)
    with pytest.raises(ValueError, match=r"does not write torch\.float16"):
        logits(q, cache, weights, lengths, table, torch.float16)


def test_deep_gemm_of_prefill(calls: Calls) -> None:
    q = torch.zeros(3, 64, 128).to(torch.float8_e4m3fn)
    k, scale = torch.zeros(50, 128).to(torch.float8_e4m3fn), torch.ones(50)
    weights, starts = torch.zeros(3, 64), torch.zeros(3, dtype=torch.int32)
    given = q, k, scale, weights, starts, starts + 50
    kernel("vllm", "ragged_logits", "vllm 0.33.0 DeepGEMM prefill")(*given, torch.float32)
    kernel("sglang", "ragged_logits", "sglang 0.5.23 DeepGEMM prefill")(*given, torch.float32)
    (vllm, none), (sglang, more) = calls.named("dense")
    assert vllm[0][0] is q and vllm[0][1] is None and vllm[1][0] is k and vllm[1][1] is scale
    assert vllm[2] is weights and vllm[5] == 50 and none == {}
    assert sglang[0] is q and sglang[1][1] is scale
    assert more == {"clean_logits": False, "max_seqlen_k": 50}
    kernel("vllm", "ragged_logits", "vllm 0.33.0 DeepGEMM prefill")(*given, torch.bfloat16)
    ((args, _),) = calls.named("dense_impl")
    assert args[1:] == (False, torch.bfloat16)


def test_sglangs_plan_is_of_the_eager_call(calls: Calls, capture: Any) -> None:
    logits, lengths, out = a_call(3)
    table = torch.zeros(3, 4, dtype=torch.int32)
    decode = kernel("sglang", "decode", "sglang 0.5.23 v2")
    paged = kernel("sglang", "paged", "sglang 0.5.23 v2")
    decode(logits, lengths, 512, out)
    capture(True)
    paged(logits, lengths, table, 512, out)
    other = torch.ones(3, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="SGLang's plan: call once eagerly"):
        paged(logits, other, table, 512, out)
    capture(False)
    assert [args for args, _ in calls.named("plan")] == [(lengths,)]
    (first, _), (second, _) = calls.named("v2")
    assert first[0] is logits and first[1] is lengths and first[2] is None and first[3] is out
    assert second[2] is table and first[4] == second[4] == 64
    assert first[5] is second[5] and first[5].tolist() == [[1, 1]] * 4
    with pytest.raises(ValueError, match="float32 only"):
        decode(logits.bfloat16(), lengths, 512, out)


def test_sglangs_small_and_ragged_topk(calls: Calls) -> None:
    logits, lengths, out = a_call(3, columns=130, dtype=torch.bfloat16)
    small = kernel("sglang", "decode", "sglang 0.5.23 bf16_small")
    small(logits, lengths, 512, out)
    ((args, _),) = calls.named("small")
    assert args[0] is logits and args[3] is out and args[4] == 64
    assert args[2].tolist() == [[0, 1, 2]] * 3  # the identity
    with pytest.raises(ValueError, match="16384 columns"):
        small(torch.zeros(1, 16_385, dtype=torch.bfloat16), lengths[:1], 512, out[:1])
    logits, _, out = a_call(3)
    starts = torch.tensor([0, 4, 8], dtype=torch.int32)
    ends = torch.tensor([10, 20, 8], dtype=torch.int32)
    kernel("sglang", "prefill", "sglang 0.5.23 ragged_v2")(logits, starts, ends, 512, out)
    ((args, _),) = calls.named("ragged")
    assert args[1].tolist() == [10, 16, 0] and args[2].tolist() == [0, 0, 0]
    assert args[3] is out and args[4] is starts


def test_flashinfer(calls: Calls) -> None:
    logits, lengths, out = a_call(2, k=4)
    kernel("flashinfer", "decode", "flashinfer 0.7.2")(logits, lengths, 4, out)
    assert out.tolist() == [[5] * 4] * 2
    starts = torch.tensor([0, 4], dtype=torch.int32)
    ends = starts + 7
    kernel("flashinfer", "prefill", "flashinfer 0.7.2 prefill")(logits, starts, ends, 4, out)
    (first, _), (second, _) = calls.named("ragged")
    assert first[0] is logits and first[1].tolist() == [0, 0] and first[2] is lengths
    assert first[3:] == (4, True, None)
    assert second[1].tolist() == [0, 0] and second[2].tolist() == [7, 7] and second[5] is starts
    table = torch.zeros(2, 4, dtype=torch.int32)
    kernel("flashinfer", "paged", "flashinfer 0.7.2 paged")(logits, lengths, table, 4, out)
    ((args, _),) = calls.named("paged")
    assert args[1] is table and args[3:6] == (4, True, 64) and args[6] is out


def test_what_an_installed_engine_has_not_got_is_named(calls: Calls, tmp_path: Path) -> None:
    for engine in OTHERS:
        assert all(installed.kernels(engine, form) for form in FORMS)
    named = installed.load(OTHERS, ("paged",), None, of="topk").missing
    assert named == {"vllm 0.33.0 paged": "its top-k answers in columns, not in pool slots"}


def test_a_deep_gemm_that_fails_is_named(calls: Calls, tmp_path: Path) -> None:
    (tmp_path / "site/deep_gemm.py").write_text("raise OSError('no CUDA\\nhere')\n")
    found = installed.load(["sglang"], ("logits",), None, of="logits")
    assert found.missing == {
        "sglang 0.5.23 DeepGEMM":
        "its DeepGEMM: deep_gemm cannot be imported (OSError: no CUDA)",
    }  # fmt: skip


def test_an_engine_whose_import_fails_is_named(calls: Calls, tmp_path: Path) -> None:
    (tmp_path / "site/vllm/__init__.py").write_text("raise RuntimeError('half an install')\n")
    for form in FORMS:
        for why in installed.kernels("vllm", form).values():
            assert isinstance(why, str)
    assert "half an install" in str(installed.kernels("vllm", "decode"))


def test_the_choices_are_the_installed_engines_own(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = installed.load(OTHERS, ("logits", "decode"), None, of="chain")
    assert found.choice("vllm", None, "vllm33") == "vllm 0.33.0"
    assert found.choice("sglang", None, "sglang_v2") == "sglang 0.5.23 v2"
    assert found.choice("vllm", "mine", "vllm33") == "mine"
    assert found.chains(("vllm 0.33.0", "sglang 0.5.23 v2")) == [
        ("vllm 0.33.0 DeepGEMM", "vllm 0.33.0"),
        ("sglang 0.5.23 DeepGEMM", "sglang 0.5.23 v2"),
    ]
    file, results = tmp_path / "peers.py", tmp_path / "x.json"
    file.write_text("def available():\n    return {'vllm33': print}\n")
    with_file = installed.load(["vllm"], ("decode",), file, of="topk")
    assert with_file.choice("vllm", None, "vllm33") == "vllm33"
    assert bench("topk", "--device", "cpu", "--against", "vllm", "--budget", 0, "--json",
                 results) == 0  # fmt: skip
    assert json.loads(results.read_text())["vllm_choice"] == "vllm 0.33.0"


def test_a_loaded_library_is_a_peer_without_its_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ops = types.SimpleNamespace(
        cooperative_topk=print, persistent_topk=print, top_k_per_row_decode=print
    )
    monkeypatch.setattr(torch.ops, "_C", ops, raising=False)
    found = installed.kernels("vllm", "decode")
    assert found.keys() == {"vllm (loaded library)"} == {installed.choice("vllm")}
    assert callable(found["vllm (loaded library)"])
    assert installed.kernels("vllm", "logits") == {
        "vllm (loaded library) DeepGEMM": "it is not in the loaded library"
    }


def test_what_is_held_is_bounded() -> None:
    held = prepared.Prepared("it", most=2)
    assert [held.get(key, lambda key=key: key * 2) for key in (1, 2, 1, 3)] == [2, 4, 2, 6]
    assert held.get(1, lambda: 0) == 2 and held.get(2, lambda: 0) == 0


# ---- The dry run ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "given", "left", "cells"),
    [
        ("topk", [], "--k 512, --rows 1 8, --columns 8192", 4),
        ("topk", ["--rows", 2], "--k 512, --columns 8192", 2),
        ("logits", [], "--rows 1, --columns 1024", 2),
        ("chain", ["--k", 8, "--rows", 1, "--columns", 70], "", 2),
    ],
)
def test_a_dry_run_is_small_unless_told_otherwise(
    what: str, given: list[Any], left: str, cells: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(what, "--device", "cpu", *given) == 0
    said = capsys.readouterr().out
    assert (f"A small grid, for a CPU: {left} (" in said) == bool(left)
    assert f"dsv4: {'right' if what == 'logits' else 'exact'}" in said
    assert f"in {cells} of {cells} cells" in said
    assert "geometric mean" not in said and "floor\n" not in said
