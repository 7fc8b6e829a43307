"""The captured training step, by a stand-in for a CUDA graph that runs the same Python again: the plain loop's bits."""
import random

import pytest
import torch
import torch.nn.functional as F
from samples import StandIn, blobs, config, half_mask
from torch import nn

from common import captured
from common.augment import Draws, draw_dsa, dsa
from common.data import Split
from common.kernels import ops, views
from common.masks import apply_mask
from common.networks import blocks_of, build_network
from common.streams import global_generators_kept, random_stream, seed_from
from common.training import Recipe, batches, train


def network(**changes):
    return build_network(config(**dict(width=8, image_size=8, num_classes=3) | changes))


def pictures(uint8=False):
    """A split of 62 images, of floats or bytes, which leaves two images to the last batch of 20."""
    split, mean, std = blobs(62), (.4, .5, .6), (.2, .3, .25)
    images = (split.images.clamp(-2, 2) * 60 + 120).to(torch.uint8) if uint8 else split.images
    return Split(images, split.labels, mean, std)


def result_of(model, split, recipe, mask=None):
    """(state, loss, accuracy, state of the generator) after training `model`."""
    generator = random_stream(5)
    trained = train(model, split, recipe, generator, mask)
    return model.state_dict(), trained.loss, trained.accuracy, generator.get_state()


def assert_same(one, other):
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert one[1:3] == other[1:3] and torch.equal(one[3], other[3])


AUGMENTS = "dsa", "crop", "imagenet", "none"
RECIPES = [dict(augment=augment, cutmix=cutmix) for augment in AUGMENTS for cutmix in (0., .5)]


@pytest.mark.parametrize("settings", [*RECIPES, dict(amp=True), dict(cutmix=1., flip=False)], ids=str)
def test_the_captured_step_is_the_eager_step(graphs, settings, monkeypatch):
    recipe = Recipe(6, lr=.05, batch_size=20, **settings)
    replayed = result_of(network(), pictures(), recipe)
    assert len(graphs) == 2  # of 20 images, and of the last two
    monkeypatch.delitem(captured.GRAPHS, "cpu")
    assert_same(result_of(network(), pictures(), recipe), replayed)


@pytest.mark.parametrize("changes", [dict(model="resnet10"), dict(norm="batch"), dict(norm="none")], ids=str)
def test_statistics_of_batch_norm_know_nothing_of_the_warm_up(graphs, changes, monkeypatch):
    model, recipe = network(**changes), Recipe(2, lr=.05, batch_size=20)
    mask = half_mask(model)
    replayed = result_of(model, pictures(uint8=True), recipe, mask)
    assert len(graphs) == 2
    monkeypatch.delitem(captured.GRAPHS, "cpu")
    assert_same(result_of(network(**changes), pictures(uint8=True), recipe, mask), replayed)


def test_a_row_holds_tensors_of_any_type_and_none():
    draws = Draws(torch.arange(5), torch.tensor(.1), rows=torch.rand(7) < .5, colour=torch.rand(5, 3))
    for row in captured.rows_on(torch.device("cpu"), [draws, draws._replace(lr=torch.tensor(.2))]):
        found = row.views()
        assert found.other is None and found.lr.shape == ()
        for part, wanted in zip(found, row.like):
            assert part is None and wanted is None or torch.equal(part, wanted)
            assert part is None or part.storage_offset() * part.element_size() % 16 == 0


class OnTheHost(nn.Module):
    """A network that does on the host what a graph would not repeat."""

    def __init__(self, how):
        super().__init__()
        self.layers, self.how, self.seen = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), how, 0

    def forward(self, x):
        y = self.layers(x)
        if self.how == "random":
            return y * (1 + random.random())
        if self.how == "dropout":  # on a CPU
            return F.dropout(y, .1, self.training)
        self.seen += 1
        return y * (1 + self.seen % 2)


@pytest.mark.parametrize("how", ["random", "dropout", "counts"])
def test_what_cannot_be_captured_runs_as_it_is_and_is_said_once(graphs, how, monkeypatch, capsys):
    def trained():
        torch.manual_seed(0)
        return result_of(OnTheHost(how), pictures(), Recipe(3, batch_size=20))

    tried = trained()
    assert capsys.readouterr().err.count("no CUDA graph") == 1 and not graphs
    monkeypatch.delitem(captured.GRAPHS, "cpu")
    assert_same(trained(), tried)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_of_cuda_is_the_step_without_one(monkeypatch, capsys):
    torch.backends.cudnn.deterministic = True
    split, results = pictures(), []
    split = Split(split.images.cuda(), split.labels.cuda(), split.mean, split.std)
    for captures in (True, False):
        if not captures:
            monkeypatch.setitem(captured.GRAPHS, "cuda", StandIn)
        results.append(result_of(network().cuda(), split, Recipe(4, lr=.05, batch_size=20)))
    assert "no CUDA graph" not in capsys.readouterr().err
    assert_same(*results)


def test_a_graph_that_fails_leaves_the_plain_step(graphs, monkeypatch, capsys):
    def fails(function):
        raise RuntimeError("operation not permitted when stream is capturing\nand more lines")

    monkeypatch.setitem(captured.GRAPHS, "cpu", fails)
    tried = result_of(network(), pictures(), Recipe(2, batch_size=20))
    assert "slower: operation not permitted when stream is capturing\n" in capsys.readouterr().err
    monkeypatch.delitem(captured.GRAPHS, "cpu")
    assert_same(result_of(network(), pictures(), Recipe(2, batch_size=20)), tried)


def test_no_memory_for_a_graph_is_no_memory(graphs, monkeypatch):
    def fails(function):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(captured.GRAPHS, "cpu", fails)
    with pytest.raises(torch.OutOfMemoryError):
        result_of(network(), pictures(), Recipe(2, batch_size=20))


#############################################
#        The loop before there were graphs  #
#############################################


def pasted(images, labels, generator):
    """CutMix by slices: (images, labels of the boxes, area kept)."""
    u, size = torch.rand(3, generator=generator).tolist(), images.shape[-1]
    half = int(size * (1 - u[0]) ** .5) // 2
    (x0, x1), (y0, y1) = ((max(int(size * place) - half, 0), min(int(size * place) + half, size)) for place in u[1:])
    other = torch.randperm(len(images), generator=generator)
    images = images.clone()
    images[:, :, y0:y1, x0:x1] = images[other][:, :, y0:y1, x0:x1]
    return images, labels[other], 1 - (x1 - x0) * (y1 - y0) / size ** 2


def plain_loop(model, split, recipe, generator, mask):
    """Draws a batch when it comes to it and makes the step at once, the loss of both labels always taken."""
    apply_mask(model, mask)
    params, network = dict(model.named_parameters()), views.view(model, mask, sample=split.batch(slice(0, 2)))
    momenta = [torch.zeros_like(p) for p in params.values()]
    for epoch in range(recipe.epochs):
        for index in batches(torch.randperm(len(split), generator=generator), recipe.batch_size):
            images, labels = split.batch(index)
            images, second, kept = dsa(images, draw_dsa(generator, len(index), recipe.flip)), labels, 1.
            if torch.rand((), generator=generator) < recipe.cutmix:
                images, second, kept = pasted(images, labels, generator)
            if blocks_of(model) is None:
                seed_from(generator, model)
            logits, kept = network(images), torch.tensor(kept)
            losses = [F.cross_entropy(logits, y, reduction="sum") / len(index) for y in (labels, second)]
            loss = kept * losses[0] + (1 - kept) * losses[1]
            grads = torch.autograd.grad(loss, params.values(), allow_unused=True, materialize_grads=True)
            ops.masked_sgd_(list(params.values()), grads, momenta, [mask.get(name) for name in params],
                            recipe.learning_rate(epoch), recipe.momentum, recipe.weight_decay)


def with_dropout():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(8, 8), nn.ReLU(), nn.AvgPool2d(2), nn.Dropout(.3),
                         nn.Flatten(), nn.Linear(128, 3))


@pytest.mark.parametrize("make", [network, lambda: network(model="resnet10"), with_dropout])
def test_a_cpu_trains_to_the_bits_of_the_loop_before_there_were_graphs(make):
    recipe, results = Recipe(6, lr=.05, batch_size=20), []
    for loop in (plain_loop, train):
        model, generator = make(), random_stream(7)
        mask = half_mask(model)
        with global_generators_kept():
            loop(model.train(), pictures(), recipe, generator, mask=mask)
        results.append((model.state_dict(), None, None, generator.get_state()))
    assert_same(*results)
