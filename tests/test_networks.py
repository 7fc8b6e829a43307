"""Networks against the paper's counts and torch's own layers."""
import math

import pytest
import torch
import torch.nn.functional as F
from samples import config

from common.errors import UserError
from common.networks import build_network, prunable


@pytest.mark.parametrize("model, size, parameters, weights", [
    ("convnet3", 32, 320_010, 318_848), ("resnet10", 32, 1_228_970, 1_226_080), ("resnet18", 32, 2_797_610, 2_792_800),
    ("resnet10", 224, None, 4_905_152), ("resnet18", 224, None, 11_172_032)])
def test_parameter_counts_are_the_papers(model, size, parameters, weights):
    network = build_network(config(model, image_size=size))
    assert sum(w.numel() for w in prunable(network).values()) == weights
    assert parameters in (None, sum(p.numel() for p in network.parameters()))


@pytest.mark.parametrize("model", ["convnet3", "resnet10"])
@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
@pytest.mark.parametrize("channels, size", [(1, 8), (1, 28), (3, 32), (3, 96)])
def test_networks_take_every_input_size(model, norm, channels, size):
    network = build_network(config(model, width=4, norm=norm, channels=channels, image_size=size))
    assert network(torch.randn(2, channels, size, size)).shape == (2, 10)


def test_group_norm_of_convnet3_is_instance_norm():
    network, x = build_network(config(width=4)), torch.randn(2, 4, 8, 8)
    assert torch.allclose(network.norm2(x), F.instance_norm(x), atol=1e-6)


def test_resnet_convolutions_are_drawn_with_the_papers_standard_deviation():
    weight = build_network(config("resnet18")).stage4_2.conv2.weight
    assert abs(weight.std().item() / math.sqrt(2 / (9 * 256)) - 1) < .01


def test_networks_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "mynet.py").write_text("from torch import nn\n"
                                       "def tiny(num_classes):\n    return nn.Linear(4, num_classes)\n")
    monkeypatch.chdir(tmp_path)
    assert build_network(config("mynet:tiny", num_classes=7)).out_features == 7
    with pytest.raises(UserError, match="mynet:big"):
        build_network(config("mynet:big"))


def test_building_a_network_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    build_network(config(width=4), seed=5)
    assert torch.equal(before, torch.get_rng_state())
