"""Networks against the paper's counts and torch's own layers."""
import math

import pytest
import torch
import torch.nn.functional as F
from samples import config
from torch import nn
from torch.nn.utils import parametrizations

from common.data import Split
from common.errors import UserError
from common.evaluation import evaluate
from common.networks import build_network, check_network, logits_at, prunable
from common.streams import random_stream
from common.training import Recipe, train


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


#############################################
#          What users' networks may be      #
#############################################


class Outputs(nn.Module):
    """Logits and features, wrapped as the networks of others wrap them."""

    def __init__(self, wrap):
        super().__init__()
        self.layer, self.wrap = nn.Linear(64, 10), wrap

    def forward(self, x):
        return self.wrap(self.layer(x.flatten(1)), x)


@pytest.mark.parametrize("wrap", [lambda y, x: y, lambda y, x: (y, x), lambda y, x: [y, y],
                                  lambda y, x: {"aux": x, "logits": y}])
def test_logits_are_found_in_what_a_network_returns(wrap):
    check_network(Outputs(wrap), torch.randn(2, 1, 8, 8), torch.tensor([0, 1]), 10)


def norm_of_one_pixel():
    return nn.Sequential(nn.Conv2d(1, 4, 8), nn.GroupNorm(4, 4), nn.Flatten(), nn.Linear(4, 10))


def in_the_memory_of_another():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10))
    model[2].weight = nn.Parameter(model[1].weight.data)
    return model


def one_row_for_all():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model[1].weight = nn.Parameter(torch.randn(1, 64).expand(10, 64))
    return model


class OnlyInTraining(Outputs):
    def forward(self, x):
        return super().forward(x) if self.training else None


class ExtraState(Outputs):
    def get_extra_state(self):
        return {"a": 1}


def plain_output(y, x):
    return y


@pytest.mark.parametrize("make, message", [
    (in_the_memory_of_another, "2.weight .* 1.weight in its memory"), (one_row_for_all, "1.weight has several weights"),
    (lambda: OnlyInTraining(plain_output), "NoneType"), (lambda: ExtraState(plain_output), "_extra_state"),
    (lambda: Outputs(lambda y, x: y * float("nan")), "NaN"),
    (lambda: Outputs(lambda y, x: {"aux": y}), "without logits"), (lambda: Outputs(lambda y, x: None), "NoneType"),
    (lambda: nn.Conv2d(3, 10, 8), "channels"), (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), "2 x 10"),
    (lambda: nn.Flatten(), "no weights"), (norm_of_one_pixel, "one pixel"),
    (lambda: parametrizations.weight_norm(nn.Linear(64, 10)), "computed"),
    (lambda: nn.Sequential(nn.Flatten(), nn.utils.spectral_norm(nn.Linear(64, 10))), "computed")])
def test_what_cannot_be_pruned_or_trained_is_one_line(make, message):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
    with pytest.raises(UserError, match=message) as raised:
        check_network(model, torch.randn(2, 1, 8, 8), torch.tensor([0, 1]), 10)
    assert "\n" not in str(raised.value)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())


class Refusing(Outputs):
    """Raises `error` where `when` says so of the network and its images."""

    def __init__(self, when, error):
        super().__init__(plain_output)
        self.when, self.error = when, error

    def forward(self, x):
        if self.when(self, x):
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize("when, shape", [
    (lambda model, x: model.training and len(x) == 6, "6 x 1 x 8 x 8"),  # the last batch
    (lambda model, x: not model.training and len(x) == 22, "22 x 1 x 8 x 8"),
    (lambda model, x: not torch.is_grad_enabled() and len(x) > 2, "22 x 1 x 8 x 8")])
def test_what_fails_only_later_is_one_line_too(when, shape):
    def both(error):
        model = Refusing(when, error)
        check_network(model, *split.batch(slice(0, 2)), 10)
        train(model, split, Recipe(1, batch_size=16), random_stream(0))
        evaluate(model, split)

    split = Split(torch.randn(22, 1, 8, 8), torch.arange(22) % 10)
    with pytest.raises(UserError, match=f"the network fails on images of {shape}: ValueError: first$"):
        both(ValueError("first\nsecond"))
    with pytest.raises(MemoryError):
        both(MemoryError())
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        both(RuntimeError("DefaultCPUAllocator: can't allocate memory"))


def test_logits_of_fewer_images_are_refused_and_our_own_failures_are_not_taken_for_the_networks():
    images, model = torch.randn(6, 1, 8, 8), Outputs(lambda y, x: y[:-1])
    with pytest.raises(UserError, match="returns 5 x 10 for 6 images, wanted 6 x classes"):
        logits_at(model, images)
    with pytest.raises(IndexError):
        logits_at(model, images, view=lambda images: images[99])
    with pytest.raises(RuntimeError):
        logits_at(build_network(config(width=4)), images)


def test_a_trial_leaves_statistics_and_generators_as_they_were():
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(.5), nn.Flatten(), nn.Linear(144, 10)
    model = nn.Sequential(*layers).eval()
    torch.manual_seed(4)
    check_network(model, torch.randn(2, 1, 8, 8), torch.tensor([0, 1]), 10)
    after = torch.rand(3)
    torch.manual_seed(4)
    torch.randn(2, 1, 8, 8)
    assert torch.equal(torch.rand(3), after)
    assert not model.training and model[1].num_batches_tracked == 0 and (model[1].running_mean == 0).all()


OWN = """import torch
from torch import nn

def layers(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))

def scripted(num_classes):
    return torch.jit.script(layers(num_classes))

def on_meta(num_classes):
    return layers(num_classes).to("meta")

def empty(num_classes):
    return nn.Flatten()

class NoSelf(nn.Linear):
    def train(self, mode=True):
        super().train(mode)

def no_self(num_classes):
    return NoSelf(64, num_classes)
"""


def test_what_is_no_module_of_layers_with_values_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "strange_nets.py").write_text(OWN)
    for name, message in (("scripted", "layers can be seen"), ("on_meta", "meta"), ("empty", "no parameters"),
                          ("no_self", "does not return")):
        with pytest.raises(UserError, match=message):
            build_network(config(f"strange_nets:{name}"))


class Counting(nn.Linear):
    def __init__(self):
        super().__init__(64, 10)
        self.register_buffer("steps", torch.zeros(()), persistent=False)
        self.idle, self.calls = nn.Linear(3, 3), 0

    def forward(self, x):
        self.steps += 1
        self.calls += 1
        return super().forward(x.flatten(1))


def test_what_a_stop_would_forget_and_what_is_not_used_is_said(capsys):
    check_network(Counting(), torch.randn(2, 1, 8, 8), torch.tensor([0, 1]), 10)
    err = capsys.readouterr().err
    assert "changes calls, steps" in err and "does not use idle.weight" in err
    check_network(build_network(config(width=4, image_size=8)), torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), 10)
    assert capsys.readouterr().err == ""
