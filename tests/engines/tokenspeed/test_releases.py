"""The adapter against real TokenSpeed code, one process for each release.

The cases are in ``cases/``. They need an environment of their own (``make_engines_cpu_env.py``)
with torch for the CPU and the Python files of each release. Under ``DSV4_CI=1`` the tests make it
if it is missing. ``DSV4_ENGINES_ENV`` names another folder, ``DSV4_TOKENSPEED_VERSIONS`` other
releases.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from kits.release_runner import Releases, versions

from benchmarks.engines.forward.variants import VARIANTS

CASES = Path(__file__).resolve().parent / "cases"
VERSIONS = versions("DSV4_TOKENSPEED_VERSIONS", "0.1.1")
RELEASES = Releases(
    "TokenSpeed", "engines", ("tokenspeed/{}/runtime", "tokenspeed/{}/kernel"),
    ("--sglang", "", "--tokenspeed", ",".join(VERSIONS)), "TOKENSPEED_",
)  # fmt: skip
FEWEST_CASES = 320


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_release(version: str, tmp_path: Path) -> None:
    RELEASES.run_cases(version, CASES, tmp_path / "report.xml", FEWEST_CASES)


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_driver_for_a_gpu(version: str, tmp_path: Path) -> None:
    """Without the plugin and with it, in one process; on a GPU the same with the kernels."""
    found = RELEASES.run_driver(version, tmp_path / "found.json")
    assert found["version"].startswith(f"TokenSpeed {version} ")
    rows = {(row["part"], row["variant"]): row for row in found["results"]}
    by_plugin = [row for row in found["results"] if row["variant"] == "bf16 plugin"]
    v41 = [row for row in by_plugin if row["part"].startswith("v41")]
    assert [row["part"].split()[1:3] for row in v41] == [
        [layer, phase] for phase in ("decode", "prefill")
        for layer in ("plain", "source", "consumer")
    ]  # fmt: skip
    for row in v41:
        assert row["exact"] and row["recall"] > 0.95
        assert row["kernel"] == "dsv4_plugin_dsv41_index_topk"
        assert row["counters"]["topk.dsv41_index_topk.bf16.torch"] == 1
    calls = {row["part"] for row in by_plugin} - {row["part"] for row in v41}
    # The Triton kernels are for a GPU.
    assert len(calls) == 3 and len(rows) == 3 * len(VARIANTS) + len(v41) + 4
    for call in calls:
        mode = "prefill" if call.startswith("prefill") else "decode"
        for dtype in ("fp32", "bf16"):
            row = rows[call, f"{dtype} plugin"]
            assert row["kernel"] == f"dsv4_plugin_dsa_{mode}_topk" and row["recall"] > 0.95
            assert row["counters"][f"topk.dsa_{mode}_topk.{dtype}.torch"] == 1
            assert row["counters"][f"logits.plugin.{dtype}.torch"] == 1
        assert rows[call, "auto"]["counters"] == rows[call, "bf16 plugin"]["counters"]
    (read,) = (row for row in found["results"] if row["variant"] == "on" and "read" in row["part"])
    assert read["exact"] and read["counters"]["read.fp8"] == 1
    assert {n for n, s in found["seams"].items() if s["engaged"]} == {
        "topk.dsa_decode_topk", "topk.dsa_prefill_topk", "topk.dsv41_index_topk", "read.fp8"
    }  # fmt: skip
    # Every variant of a call before the next call: a run that is cut short has whole calls.
    order = [row["part"] for row in found["results"] if row["part"] in calls]
    assert order == [call for call in dict.fromkeys(order) for _ in VARIANTS]


@pytest.mark.slow
def test_a_run_that_is_cut_short_names_what_is_missing(tmp_path: Path) -> None:
    found = RELEASES.run_driver(VERSIONS[0], tmp_path / "found.json", budget=0)
    assert not found["complete"] and not found["results"]
    assert {"read on", "decode 2x700 k512 logical bf16 plugin"} <= set(found["not_run"])
