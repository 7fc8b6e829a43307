"""How many kernels a GPU would be asked for, and bytes, counted on meta tensors: shapes and layouts without values."""
import collections

import pytest
import timing
import torch
from samples import config
from torch.utils._python_dispatch import TorchDispatchMode

from common.augment import Draws, draw_batch, even
from common.data import Split
from common.kernels import ops, points
from common.masks import dense_mask
from common.networks import build_network
from common.streams import random_stream
from common.training import Recipe, make_step

NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias",
             "lift_fresh", "detach"}
SEVERAL = {
    "convolution": lambda args: 1 + (args[2] is not None),  # the bias
    "convolution_backward": lambda args: sum(args[-1]),
    "nll_loss_backward": lambda args: 2,  # zeros, then the hits
    "norm_relu_pool_backward": lambda args: 2,  # the sum over images
    "cross_entropy_top1": lambda args: 2,
    "masked_sgd_": lambda args: -(-len(args[0]) // 88),
}
COPIES = ("clone", "copy_", "_to_copy")

pytestmark = pytest.mark.skipif(not ops.load(), reason="needs the extension")


class Launches(TorchDispatchMode):
    """Counts kernels by the name of their op, and tensors that come from the CPU."""

    def __init__(self):
        super().__init__()
        self.counts, self.uploads = collections.Counter(), 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
        if not is_view and name not in NO_KERNEL:
            self.counts[name] += SEVERAL.get(name, lambda args: 1)(args)
        if name in COPIES and args[0].device.type == "cpu" and result.device.type == "meta":
            self.uploads += 1
        return self.as_cudnn_lays_out(args, result) if name == "convolution" else result

    def as_cudnn_lays_out(self, args, result):
        """channels_last where images or weights are, the others being copied into it first."""
        if not any(ops.layout(tensor) == torch.channels_last for tensor in args[:2]):
            return result
        self.counts["clone"] += sum(not t.is_contiguous(memory_format=torch.channels_last) for t in args[:2])
        return result.contiguous(memory_format=torch.channels_last)


@pytest.fixture
def on_meta(monkeypatch):
    """The ops take meta tensors as they would take those of a GPU."""
    monkeypatch.setattr(ops, "runs_on", lambda device_type: True)


def step_of(model, uint8=False, cutmix=.5, **changes):
    """(a training step, the Draws of a batch of 64) of a network on meta."""
    network = build_network(config(model, **changes)).to("meta").train()
    images = torch.empty(400, 3, 32, 32, device="meta", dtype=torch.uint8 if uint8 else torch.float32)
    split = Split(images, torch.empty(400, dtype=torch.long, device="meta"), (.4, .5, .6), (.2, .3, .25))
    recipe = Recipe(1, cutmix=cutmix)
    mask = {name: kept.to("meta") for name, kept in dense_mask(network).items()}
    momenta = [torch.zeros_like(p) for p in network.parameters()]
    draws = even(draw_batch(torch.arange(64), .01, split, recipe, random_stream(0)), recipe, split)
    draws = Draws(*(None if part is None else part.to("meta") for part in draws))
    return make_step(network, split, mask, momenta, recipe), draws


@pytest.mark.parametrize("model, changes, most", [
    ("convnet3", dict(width=128), 60), ("convnet3", dict(width=128, uint8=True), 64),
    ("convnet3", dict(width=128, cutmix=0.), 45), ("resnet18", {}, 190)])
def test_a_training_step_asks_for_few_kernels(on_meta, model, changes, most):
    step, draws = step_of(model, **changes)
    with Launches() as launches:
        step(draws)
    assert sum(launches.counts.values()) <= most, launches.counts
    assert not launches.uploads


def points_on_meta(model, monkeypatch, images=10_000, **changes):
    """The Launches of evaluating 11 points between two networks on `images` images."""
    network = build_network(config(model, **changes)).to("meta")
    split = Split(torch.empty(images, 3, 32, 32, device="meta"), torch.empty(images, dtype=torch.long, device="meta"))
    line = [(1 - a / 10, a / 10) for a in range(11)]
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: [])  # of values that are not there
    with Launches() as launches:
        points.sums_at_points(network, [network.state_dict()] * 2, line, [split])
    return launches.counts


def test_points_ask_for_few_kernels_and_copy_for_the_classifier_alone(on_meta, monkeypatch):
    counts = points_on_meta("convnet3", monkeypatch, width=128)
    assert sum(counts.values()) <= 700, counts
    batches = 11 * 5  # of every point, its flattened activations
    once = 2 * 3 + 1  # kernels of the states, and the images
    assert sum(counts[name] for name in COPIES) <= batches + once, counts


def test_norms_are_folded_once_a_point(on_meta, monkeypatch):
    counts = points_on_meta("resnet18", monkeypatch)
    assert counts["rsqrt"] == 20 * 11
    assert sum(counts.values()) <= 4200, counts


def test_the_floors_of_benches_hold_known_bytes_and_operations(on_meta):
    x, y = (torch.empty(64, 32, device="meta") for _ in range(2))
    assert timing.counted(lambda: y.copy_(x)) == (2 * 64 * 32 * 4, 0)
    assert timing.counted(lambda: x @ y.T) == (4 * (2 * 64 * 32 + 64 * 64), 2 * 64 * 32 * 64)
    assert timing.counted(lambda: x.add_(y[:1].expand(64, 32))) == (4 * (2 * 64 * 32 + 64 * 32), 0)
    assert timing.counted(lambda: torch.empty_like(x)[:8].T) == (0, 0)
    states, points = torch.empty(2, 100, device="meta"), torch.empty(7, 100, device="meta")
    combine_ = torch.ops.lottery.combine_
    assert timing.counted(lambda: combine_(points, states, torch.empty(7, 2, device="meta"), None)) == (
        4 * (7 * 100 + 2 * 100 + 7 * 2), 0)
    step, draws = step_of("convnet3", width=128)
    moved, operations = timing.counted(lambda: step(draws))
    assert moved == pytest.approx(285e6, rel=.05) and operations == pytest.approx(19e9, rel=.01)
