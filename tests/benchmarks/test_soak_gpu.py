"""Load on a GPU: `python -m benchmarks.soak` for twenty seconds.

It looks at the memory of the whole device, so it fails beside another process that uses the GPU.
"""

import pytest

from benchmarks.soak.load import Shape, soak

pytestmark = pytest.mark.gpu


def test_replays_of_43_layers_on_two_streams():
    result = soak(device="cuda", seconds=20)
    assert result.faults == []
    assert result.replays >= 100 and result.looks >= 3 and result.allocations >= 50
    assert len(set(result.allocated)) == 1, f"memory is not flat: {result.allocated}"


def test_small_chains_many_times():
    result = soak(device="cuda", seconds=5, shape=Shape(layers=43, rows=1, columns=9000, tokens=8))
    assert result.faults == [] and result.replays >= 200
