"""The dispatch: the choice of auto, the effect of an explicit choice, and its messages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dsv4_plugin.errors import Dsv4Error, SettingError, UnmetError
from dsv4_plugin.kernels import cuda, reference, triton_cache
from dsv4_plugin.kernels.arguments import MAX_K
from dsv4_plugin.ops import dispatch as backends
from dsv4_plugin.ops.dispatch import Call

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
TOPK = Call("topk", GPU, torch.bfloat16, 512)
MXFP4 = Call("read_mxfp4", GPU, torch.bfloat16)  # an op that has no CUDA form
FP4 = Call("paged_logits", GPU, torch.bfloat16, heads=32, fp4=True)
HOPPER, AMPERE, TURING = (9, 0), (8, 0), (7, 5)


@pytest.fixture(autouse=True)
def forget_choices() -> Iterator[None]:
    backends._load.cache_clear()
    yield
    backends._load.cache_clear()


class Machine:
    """A machine as the dispatch sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        monkeypatch.setattr(triton_cache, "INTERPRETED", False)
        monkeypatch.setattr(torch.version, "hip", None)
        self.has(HOPPER)

    def has(self, capability: tuple[int, int], missing: str | None = None) -> None:
        self._patch.setattr(backends, "capability", lambda device: capability)
        self._patch.setattr(cuda, "missing", lambda: missing)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_auto_takes_the_best_form_an_op_has(machine: Machine) -> None:
    assert backends.ORDER == ("cuda", "triton", "torch")
    assert backends.choose(TOPK) == "cuda"
    assert backends.choose(MXFP4) == "triton"


@pytest.mark.parametrize(
    ("call", "capability", "missing", "want"),
    [
        (TOPK, AMPERE, None, "torch"),
        (TOPK, (10, 0), None, "torch"),
        (TOPK, HOPPER, "no library", "torch"),
        (Call("topk", GPU, torch.float32, MAX_K + 1), HOPPER, None, "torch"),
        (Call("topk", CPU, torch.float32, 512), HOPPER, None, "torch"),
        (MXFP4, AMPERE, None, "triton"),
        (MXFP4, TURING, None, "torch"),
        (Call("gather", GPU, torch.uint8), HOPPER, "no library", "triton"),
        (Call("gather", GPU, torch.uint8), HOPPER, None, "cuda"),
        (Call("read", GPU, torch.float32), HOPPER, None, "cuda"),
        (Call("paged_logits", GPU, torch.bfloat16, heads=32), HOPPER, None, "cuda"),
        (Call("paged_logits", GPU, torch.bfloat16, heads=16), HOPPER, None, "torch"),
        (Call("paged_logits", GPU, torch.bfloat16, block_size=32), HOPPER, None, "cuda"),
        (Call("paged_logits", GPU, torch.bfloat16, block_size=16), HOPPER, None, "torch"),
        (Call("paged_logits", GPU, torch.bfloat16, alignment=8), HOPPER, None, "torch"),
        (Call("block_maxima", GPU, torch.bfloat16, block_size=32, heads=32), HOPPER, None, "cuda"),
        (Call("block_maxima", GPU, torch.bfloat16, block_size=16), HOPPER, None, "torch"),
        (Call("block_maxima", GPU, torch.bfloat16, alignment=8), HOPPER, None, "torch"),
        (Call("select_blocks", GPU, torch.float16, 2048), HOPPER, None, "cuda"),
        (Call("select_blocks", GPU, torch.float16, 2048, piece=4), HOPPER, None, "torch"),
        (FP4, HOPPER, None, "cuda"),
        (FP4._replace(heads=64), HOPPER, None, "torch"),
        (FP4._replace(block_size=32), HOPPER, None, "torch"),
        (FP4._replace(alignment=8), HOPPER, None, "torch"),
        (Call("candidate_logits", GPU, torch.float32, candidates=2048), HOPPER, None, "cuda"),
        (Call("candidate_logits", GPU, torch.float32, candidates=2049), HOPPER, None, "torch"),
        (Call("candidate_logits", GPU, torch.float32, heads=16), HOPPER, None, "torch"),
        (Call("candidate_select", GPU, torch.float16, 512, block_size=32), HOPPER, None, "cuda"),
        (Call("candidate_select", GPU, torch.float16, 512, block_size=16), HOPPER, None, "torch"),
        (Call("candidate_logits_ragged", GPU, torch.float32), AMPERE, None, "torch"),
        (Call("select_candidates", GPU, torch.float32, 512, candidates=64), HOPPER, None, "cuda"),
        (Call("ragged_logits", GPU, torch.float16), HOPPER, None, "cuda"),
        (Call("ragged_logits", GPU, torch.float16), HOPPER, "no library", "torch"),
        (Call("read", GPU, torch.float32, block_size=32), HOPPER, None, "cuda"),
        (Call("read", GPU, torch.float32, head_dim=64), HOPPER, None, "triton"),
        (Call("read", GPU, torch.float32, alignment=4), HOPPER, None, "triton"),
        (Call("read_mxfp4", CPU, torch.float32), HOPPER, None, "torch"),
    ],
)
def test_auto_falls_back(
    machine: Machine, call: Call, capability: tuple[int, int], missing: str | None, want: str
) -> None:
    machine.has(capability, missing)
    assert backends.choose(call) == want


def test_the_interpreter_of_triton_serves_the_cpu(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_cache, "INTERPRETED", True)
    assert backends.choose(Call("read", CPU, torch.float32)) == "triton"


def test_rocm_is_told_from_cuda(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert backends.unmet(TOPK, "cuda") == ["this torch is built for ROCm"]


def test_an_explicit_choice_is_taken(machine: Machine) -> None:
    assert backends.choose(TOPK, "cuda") == "cuda"
    assert backends.choose(TOPK, "torch") == "torch"
    assert backends.resolve(TOPK, "torch") is reference.topk
    assert backends.resolve(TOPK, "cuda") is cuda.topk
    assert backends.resolve(MXFP4, "triton") is triton_cache.read_indexer_cache_mxfp4


def test_what_fp4_keys_need_is_said(machine: Machine) -> None:
    reasons = backends.unmet(FP4._replace(heads=64, block_size=32), "cuda")
    assert reasons == [
        "q has 64 heads, the kernels need 32 for FP4 keys",
        "block_size is 32, the kernel needs 64 for FP4 keys",
    ]


def test_an_explicit_choice_is_refused_with_every_reason(machine: Machine) -> None:
    machine.has(AMPERE, "the library is broken")
    call = Call("topk", GPU, torch.float32, MAX_K + 1)
    with pytest.raises(UnmetError) as caught:
        backends.resolve(call, "cuda")
    assert len(caught.value.unmet) == 3
    message = str(caught.value)
    assert "backend 'cuda' for topk" in message
    for reason in ("8.0", "9.0", "the library is broken", f"k is {MAX_K + 1}, more than {MAX_K}"):
        assert reason in message
    assert isinstance(caught.value, (Dsv4Error, RuntimeError))


def test_a_form_that_an_op_does_not_have_is_refused(machine: Machine) -> None:
    with pytest.raises(UnmetError, match="topk has no triton implementation; it has cuda, torch"):
        backends.choose(TOPK, "triton")
    with pytest.raises(UnmetError, match="'cudnn' is no backend; there are cuda, triton, torch"):
        backends.choose(TOPK, "cudnn")


def test_unmet_never_hides_that_the_tensors_are_on_the_cpu(machine: Machine) -> None:
    for call, backend in ((Call("topk", CPU, torch.float32, 8), "cuda"), (
        Call("read", CPU, torch.float32), "triton",
    )):  # fmt: skip
        assert any("not on a CUDA device" in reason for reason in backends.unmet(call, backend))


def test_the_setting_binds_the_ops_that_have_the_form(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.has(HOPPER, "no library")
    monkeypatch.setenv("DSV4_BACKEND", "cuda")
    with pytest.raises(UnmetError, match="no library"):
        backends.resolve(TOPK)
    assert backends.resolve(MXFP4) is triton_cache.read_indexer_cache_mxfp4
    monkeypatch.setenv("DSV4_BACKEND", "triton")
    assert backends.resolve(TOPK) is reference.topk
    monkeypatch.setenv("DSV4_BACKEND", "torch")
    assert backends.resolve(MXFP4) is reference.read_indexer_cache_mxfp4


def test_an_argument_wins_over_the_setting(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSV4_BACKEND", "cuda")
    assert backends.resolve(TOPK, "torch") is reference.topk
    assert backends.resolve(TOPK, "auto") is cuda.topk


def test_a_wrong_setting_is_an_error_of_the_call(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSV4_BACKEND", "cudnn")
    with pytest.raises(SettingError, match="DSV4_BACKEND"):
        backends.resolve(TOPK)
    # An op does not report a wrong value of a setting that it does not read.
    monkeypatch.setenv("DSV4_BACKEND", "")
    monkeypatch.setenv("DSV4_TOPK", "bf17")
    assert backends.resolve(TOPK)
