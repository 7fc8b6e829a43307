"""Training against torch's optimizer and schedule; going on from any step."""
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from samples import blobs, config, half_mask

from common import files, training
from common.errors import UserError
from common.masks import apply_mask
from common.networks import build_network
from common.streams import random_stream
from common.training import Recipe, train


def reference_training(model, split, recipe, stream, mask):
    """The same training through torch.optim.SGD and MultiStepLR, without augmentation."""
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    steps = [2 * recipe.epochs // 3, 5 * recipe.epochs // 6]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, steps, gamma=.2)
    for _ in range(recipe.epochs):
        for index in torch.randperm(len(split), generator=stream).split(recipe.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(split.images[index]), split.labels[index]).backward()
            optimizer.step()
            apply_mask(model, mask)
        schedule.step()


def test_training_equals_torchs_optimizer_with_masks():
    recipe = Recipe(6, lr=.05, batch_size=16, augment="none", cutmix=0.)
    models = [build_network(config(width=4, image_size=8, num_classes=3)) for _ in range(2)]
    mask = half_mask(models[0])
    for model in models:
        apply_mask(model, mask)
    train(models[0], blobs(), recipe, random_stream(3), mask)
    reference_training(models[1], blobs(), recipe, random_stream(3), mask)
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        assert torch.allclose(a, b, atol=2e-5)


def test_pruned_weights_are_exactly_zero_after_training():
    model = build_network(config(width=4, image_size=8, num_classes=3))
    mask = half_mask(model)
    train(model, blobs(), Recipe(3, lr=.1), random_stream(0), mask)
    for name, kept in mask.items():
        assert (model.get_parameter(name)[~kept] == 0).all() and (model.get_parameter(name)[kept] != 0).all()


def trained(recipe, stops):
    """(state, Training) of a network trained to one epoch after the other."""
    model, stream, now = build_network(config(width=8, image_size=8, num_classes=3)), random_stream(1), None
    for stop in stops:
        now = train(model, blobs(), recipe, stream, until=stop, training=now)
    return model.state_dict(), now


def assert_same(a, b):
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_training_in_two_spans_is_training_in_one():
    recipe = Recipe(6, lr=.1)
    (one, at_once), (two, with_a_stop) = trained(recipe, [None]), trained(recipe, [2, None])
    assert_same(one, two)
    assert (at_once.loss, at_once.accuracy, at_once.images_seen) == (
        with_a_stop.loss, with_a_stop.accuracy, with_a_stop.images_seen)
    assert at_once.images_seen == 6 * 60 and at_once.epoch == 6


class Killed(Exception):
    pass


@pytest.mark.parametrize("steps", [1, 4, 8, 9])  # an epoch has four
def test_training_goes_on_from_any_step(tmp_path, steps):
    recipe = Recipe(3, lr=.1, batch_size=16)
    straight, _ = trained(recipe, [None])
    model, stream = build_network(config(width=8, image_size=8, num_classes=3)), random_stream(1)
    seen = []

    def kill(now):
        seen.append(now.step)
        if len(seen) - seen.count(0) == steps:  # the ends of epochs apart
            files.save(tmp_path / "training.pt", training.pack(now, model, stream))
            raise Killed

    with pytest.raises(Killed):
        train(model, blobs(), recipe, stream, progress=kill)
    model, stream = build_network(config(width=8, image_size=8, num_classes=3), seed=5), random_stream(5)
    now = training.unpack(files.load(tmp_path / "training.pt"), model, stream)
    train(model, blobs(), recipe, stream, training=now)
    assert_same(straight, model.state_dict())
    assert now.images_seen == 3 * 60


def test_loss_that_is_not_finite_is_named():
    model = build_network(config(width=4, image_size=8, num_classes=3, norm="none"))
    with pytest.raises(UserError, match=r"epoch \d+, step \d+"):
        train(model, blobs(), Recipe(20, lr=1e6), random_stream(0))


class OwnGenerators(torch.nn.Sequential):
    """Draws from generators that it holds itself."""

    def __init__(self):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(192, 3))
        self.held = torch.Generator(), random.Random(), np.random.default_rng()
        self.torchs, self.pythons, self.numpys = self.held

    def forward(self, x):
        noise = torch.rand((), generator=self.torchs) + self.pythons.random() + self.numpys.random()
        return super().forward(x) * noise


def test_generators_that_modules_hold_repeat_too():
    states = []
    for stop in (None, 1):
        torch.manual_seed(0)
        model, stream = OwnGenerators(), random_stream(1)
        training = train(model, blobs(), Recipe(2), stream, until=stop)
        if stop:  # goes on in another process, whose generators are new ones
            fresh = OwnGenerators()
            fresh.load_state_dict(model.state_dict())
            train(fresh, blobs(), Recipe(2), stream, training=training)
            model = fresh
        states.append(model[1].weight)
    assert torch.equal(*states)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.complex64])
def test_networks_of_other_numbers_train_as_torch_trains_them(kind):
    class Wrapped(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1).to(kind)).abs().float()

    models = [Wrapped(192, 3, dtype=kind) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    recipe = Recipe(2, lr=.05, batch_size=16, augment="none", cutmix=0.)
    train(models[0], blobs(), recipe, random_stream(3))
    reference_training(models[1], blobs(), recipe, random_stream(3), {})
    close = {torch.bfloat16: .02}.get(kind, 1e-5)
    assert torch.allclose(models[0].weight, models[1].weight, atol=close)
