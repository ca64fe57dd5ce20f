"""How fast a model would be: what is raced is the pruned model, and layers without a kernel are left out."""

import pytest
import torch
from torch import nn

from nmconvert.onnx_graph import tensor_infos
from nmconvert.pace import Pace
from nmconvert.pattern import Pattern
from nmconvert.runtime import kernels
from nmconvert.runtime.choice import calls

pytestmark = pytest.mark.skipif(not kernels().usable, reason=f"no native kernels: {kernels().reason}")


@pytest.fixture(scope="module")
def pace():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))
    return Pace(model.eval(), torch.zeros(8, 256))


def test_every_planned_layer_is_timed_both_ways(pace):
    plan = {"0.weight": (Pattern(1, 16), "channel"), "2.weight": (Pattern(2, 4), "channel")}
    found = pace.layers(plan)
    assert set(found) == set(plan)
    assert all(0 < fast <= dense for dense, fast in found.values())


def test_the_whole_model_is_raced_with_the_plan_that_is_asked_for(pace):
    assert pace.speedup({}) == 1.0
    pruned = pace._pruned({"0.weight": (Pattern(1, 16), "channel")})
    assert len(calls(pruned)) == 1
    assert "2.weight" in {info.name for info in tensor_infos(pruned) if info.kind}  # left dense
    assert pace.speedup({"0.weight": (Pattern(1, 16), "channel"), "2.weight": (Pattern(1, 16), "channel")}) > 0
