"""The adapter against real SGLang code, one process for each release.

The cases are in ``cases/``. They need an environment of their own (``make_engines_cpu_env.py``)
with torch for the CPU and the Python files of each release. Under ``DSV4_CI=1`` the tests make it
if it is missing. ``DSV4_ENGINES_ENV`` names another folder, ``DSV4_SGLANG_VERSIONS`` other
releases.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from kits.real_client import check
from kits.release_runner import Releases, versions

from benchmarks.engines.forward.variants import VARIANTS

CASES = Path(__file__).resolve().parent / "cases"
VERSIONS = versions("DSV4_SGLANG_VERSIONS", "0.5.23,0.5.16")
# Between the newest and the oldest: what is patched, decided and said, without the calls.
MIDDLE_VERSIONS = ["0.5.20", "0.5.19"]
# The seams of DeepSeek-V4.1 and of the budget are there from 0.5.22 on.
V41_VERSIONS = versions("DSV4_SGLANG_VERSIONS", "0.5.23,0.5.22")
RELEASES = Releases(
    "SGLang", "engines", ("sglang/{}",),
    (
        "--sglang", ",".join(dict.fromkeys((*VERSIONS, *MIDDLE_VERSIONS, *V41_VERSIONS))),
        "--tokenspeed", "",
    ),
    "SGLANG_",
)  # fmt: skip
V41_FILES = ["case_budget.py", *sorted(path.name for path in CASES.glob("case_v41_*.py"))]
FILES = sorted({path.name for path in CASES.glob("case_*.py")} - {*V41_FILES})
MIDDLE_FILES = ["case_debug.py", "case_flag.py", "case_guard.py", "case_hooks.py"]
FEWEST_CASES, MIDDLE_FEWEST_CASES, V41_FEWEST_CASES = 175, 115, 75
# SGLang's Triton kernels run in Triton's interpreter.
INTERPRET = {"TRITON_INTERPRET": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_release(version: str, tmp_path: Path) -> None:
    RELEASES.run_cases(version, CASES, tmp_path / "report.xml", FEWEST_CASES, FILES)


@pytest.mark.slow
@pytest.mark.parametrize("version", MIDDLE_VERSIONS)
def test_seams_in_release(version: str, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    RELEASES.run_cases(version, CASES, report, MIDDLE_FEWEST_CASES, MIDDLE_FILES)


@pytest.mark.slow
@pytest.mark.parametrize("version", V41_VERSIONS)
def test_v41(version: str, tmp_path: Path) -> None:
    """DeepSeek-V4.1's index layers, and the cut of a long prefill of V4."""
    report = tmp_path / "report.xml"
    RELEASES.run_cases(version, CASES, report, V41_FEWEST_CASES, V41_FILES, INTERPRET)


@pytest.mark.slow
@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
def test_bench_client(version: str, tmp_path: Path) -> None:
    """``sglang.bench_serving`` takes what ``dsv4-plugin ab`` gives, and answers what ab reads."""
    script = Path(__file__).with_name("bench_client.py")
    check("sglang", RELEASES.python, script, RELEASES.find(version), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
def test_the_driver_for_a_gpu(version: str, tmp_path: Path) -> None:
    """Without the plugin and with it, in one process; on a GPU the same with the kernels."""
    found = RELEASES.run_driver(version, tmp_path / "found.json")
    assert found["version"] == f"SGLang {version}"
    rows = {(row["part"], row["variant"]): row for row in found["results"]}
    calls = {part for part, variant in rows if variant == "off"}
    assert len(calls) == 6 and len(rows) == 6 * (1 + len(VARIANTS)) + 1
    for call in calls:
        assert not rows[call, "off"]["counters"]
        for dtype in ("fp32", "bf16"):
            counters = rows[call, f"{dtype} plugin"]["counters"]
            assert counters[f"logits.plugin.{dtype}.torch"] == 1
            assert counters[f"topk.paged.{dtype}.torch"] == 1
        # On a CPU `auto` leaves no prefill to DeepGEMM.
        assert rows[call, "auto"]["counters"] == rows[call, "bf16 plugin"]["counters"]
        assert rows[call, "fp32"]["agreement"] == 1.0
        assert rows[call, "bf16"]["counters"]["logits.bf16"] == 1
    assert found["seams"]["topk.paged"]["why"] is None


@pytest.mark.slow
def test_the_driver_of_v41_for_a_gpu(tmp_path: Path) -> None:
    found = RELEASES.run_driver(
        V41_VERSIONS[0], tmp_path / "found.json", options=["--model", "v41"], more=INTERPRET
    )
    rows = {(row["part"], row["variant"]): row for row in found["results"]}
    calls = {part for part, variant in rows if variant == "off"}
    assert len(calls) == 3 and len(rows) == 3 * 2 + 1
    for call in calls:
        assert rows[call, "off"]["layers"].keys() == rows[call, "plugin"]["layers"].keys()
        assert rows[call, "plugin"]["agreement"] >= 0.99
        assert {f"topk.v41.{kind}" for kind in ("plain", "source", "consumer")} <= {
            *rows[call, "plugin"]["counters"]
        }
    assert found["seams"]["topk.candidates"]["why"] is None
