"""The guards themselves: they find a write outside of a tensor or into an input."""

import pytest
import torch
from kits.canary import CANARY, GUARD, Canaries, Guarded

DTYPES = [torch.uint8, torch.bfloat16, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("stride", "offset"), [(7, 0), (9, 0), (12, 5)])
def test_what_is_inside_is_free(dtype, stride, offset):
    held = Guarded(3, 7, dtype, stride=stride, offset=offset)
    assert held.inside.shape == (3, 7) and held.inside.stride() == (stride, 1)
    before = held.inside.clone()
    held.assert_untouched()
    assert torch.equal(held.inside, before), "a check changes nothing"
    held.inside.fill_(1)
    held.assert_untouched()


@pytest.mark.parametrize(
    ("at", "words"),
    [(-1, "before it"), (-GUARD, "before it"), (7, "between its rows"), (25, "behind it")],
)
def test_every_byte_outside_is_guarded(at, words):
    held = Guarded(3, 7, torch.uint8, stride=9)
    held.bytes[GUARD + at] = CANARY ^ 1
    with pytest.raises(AssertionError, match=f"1 bytes {words} were written.*in a test"):
        held.assert_untouched("in a test")


def test_no_rows():
    held = Guarded(0, 7, torch.int32, stride=9)
    held.assert_untouched()
    held.bytes[GUARD] = 0
    assert held.fault()


def strided():
    return torch.arange(400, dtype=torch.int32).as_strided((5, 30), (40, 1), 3)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4, 9),
        strided(),
        torch.arange(20)[::2],
        torch.randn(40).as_strided((3, 20), (7, 1)),
        torch.zeros(2, 3, dtype=torch.uint8)[:, 1:],
    ],
    ids=["plain", "strided", "every second", "rows that overlap", "offset"],
)
def test_a_guarded_copy_is_the_same_tensor(tensor):
    canaries = Canaries()
    copy = canaries.around("x", tensor)
    assert torch.equal(copy, tensor)
    assert copy.stride() == tensor.stride() and copy.dtype == tensor.dtype
    assert copy.data_ptr() != tensor.data_ptr()
    assert copy.data_ptr() % 256 == tensor.data_ptr() % 256
    canaries.check()
    copy[0] += 1
    with pytest.raises(AssertionError, match="x was written to"):
        canaries.check("after it")


def test_outside_of_a_copy_and_of_an_output():
    canaries = Canaries()
    copy = canaries.around("x", strided())
    out = canaries.output("out", 3, 5, torch.int32, "cpu")
    out.fill_(3)
    canaries.check()
    out.as_strided((1,), (1,), out.storage_offset() + 15).fill_(0)
    with pytest.raises(AssertionError, match="behind it.*out"):
        canaries.check()
    assert copy.numel() == 150


def test_a_write_in_the_gap_between_rows_of_an_input_is_seen():
    canaries = Canaries()
    copy = canaries.around("x", strided())
    copy.as_strided((1,), (1,), copy.storage_offset() + 35).fill_(-1)
    with pytest.raises(AssertionError, match="x was written to"):
        canaries.check()


def test_large_tensors_and_empty_ones_stay_as_they_are():
    canaries = Canaries(most=100)
    for tensor in (torch.zeros(26), torch.zeros(0, 4)):
        assert canaries.around("x", tensor) is tensor
    canaries.check()
