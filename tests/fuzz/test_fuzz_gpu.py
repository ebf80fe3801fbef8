"""Random calls of every op on a GPU; a failure shows the command that repeats it."""

import pytest
from kits.topk_device import DEVICE

from dsv4_plugin.errors import UnmetError
from tests.fuzz.engine import OPS, backends_here, run_case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("block", range(20))
def test_random_calls(op, block):
    each = 20 if op == "topk" else 8
    refused = 0
    for seed in range(block * each, (block + 1) * each):
        case = OPS[op].draw(seed, DEVICE, backends_here(op, DEVICE))
        try:
            failure = run_case(case, DEVICE)
        except UnmetError:  # an implementation that was named and does not take such a call
            refused += 1
            continue
        again = f"python -m tests.fuzz --device {DEVICE} --case {case}"
        assert failure is None, f"{failure.why}: {again}"
    assert refused < each / 2
