"""One model with random weights, and the explorer of what it selects in a text."""

import pytest
import torch

from nsa_lite import DecoderLM, ModelConfig, NSAConfig
from nsa_lite.show.explorer import SelectionExplorer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DecoderLM(ModelConfig(256, 2, nsa=NSAConfig.small()))


@pytest.fixture
def explorer(model):
    return SelectionExplorer.of_model(model, "def f(x):\n    return (x, x)\n" * 4)
