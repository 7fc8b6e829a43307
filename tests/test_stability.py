"""stability.py against closed forms, brute force and networks with a known symmetry."""
import itertools
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import splits
import tickets
import stability
from common import Split, UserError

CONFIG = dict(model="convnet3", dataset="digits", width=4, norm=None, image_size=8, channels=1, num_classes=10,
              seed=0, train_images=200, data="real", ipc=10, eval_epochs=2, lr=.05, momentum=.9, weight_decay=5e-4,
              batch_size=64, augment="dsa", cutmix=.5, flip=False)


def noise_split(n, channels=1, size=8):
    generator = torch.Generator().manual_seed(0)
    return Split(torch.randn(n, channels, size, size, generator=generator), torch.arange(n) % 10)


def half_mask(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(w.shape, generator=generator) < .5 for name, w in common.prunable(model).items()}


def subnetwork(seed=0, **changes):
    config = CONFIG | changes
    model = common.build_network(config, seed)
    masks = half_mask(model, seed)
    return {"format": tickets.MASK_FORMAT, "round": 3, "sparsity": common.sparsity(masks), "masks": masks,
            "init": model.state_dict(), "config": config, "results": {}}


@pytest.fixture
def mask_file(tmp_path):
    common.save(tmp_path / "masks" / "r3.pt", subnetwork())
    return tmp_path / "masks" / "r3.pt"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["stability.py", *map(str, arguments)])
    stability.main()


# Barriers


def test_barriers_of_known_curves():
    alphas = np.linspace(0, 1, 11)
    slope = 3 - 2 * alphas
    assert stability.barrier(slope) == pytest.approx(0)
    assert stability.barrier(slope + 4 * .7 * alphas * (1 - alphas)) == pytest.approx(.7)
    assert stability.barrier(slope - alphas * (1 - alphas)) == pytest.approx(0)
    assert stability.midpoint_barrier(slope - 4 * .7 * alphas * (1 - alphas)) == pytest.approx(-.7)
    assert stability.midpoint_barrier([0., 1., 3., 0.]) == pytest.approx(2)  # no point at 1/2: between its neighbours


class Product(nn.Module):
    """Logit u v for class 0: (s, s) and (-s, -s) are the same function, with logit 0 halfway."""

    def __init__(self):
        super().__init__()
        self.u, self.v = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return torch.stack([self.u * self.v * x.flatten(), torch.zeros(len(x))], 1)


def test_toy_of_two_parameters_has_the_barrier_of_its_closed_form():
    s, split = 2., Split(torch.ones(5, 1, 1, 1), torch.zeros(5, dtype=torch.long))
    a, b = ({"u": torch.tensor(sign * s), "v": torch.tensor(sign * s)} for sign in (1, -1))
    pair = stability.walk(Product(), a, b, (split, split), 11)
    expected = [math.log1p(math.exp(-(s * (1 - 2 * alpha)) ** 2)) for alpha in np.linspace(0, 1, 11)]
    assert pair["train_loss"] == pytest.approx(expected, rel=1e-5)
    height = math.log(2) - math.log1p(math.exp(-s * s))
    assert stability.barriers(pair)["barrier_test_loss"] == pytest.approx(height, rel=1e-5)


# Lines between networks


@pytest.mark.parametrize("changes", [{}, {"model": "resnet10", "width": 2}])
def test_line_equals_networks_interpolated_by_hand_with_pruned_weights_zero(changes):
    nets = [common.build_network(CONFIG | changes, seed) for seed in (1, 2)]
    mask, split = half_mask(nets[0]), noise_split(20)
    states = [net.state_dict() for net in nets]
    pair = stability.walk(common.build_network(CONFIG | changes), *states, (split, split), 5, mask)
    for k, alpha in enumerate((0, .25, .5, .75, 1)):
        point = common.build_network(CONFIG | changes).double().eval()
        with torch.no_grad():
            for name, value in point.state_dict().items():
                value.copy_((1 - alpha) * states[0][name].double() + alpha * states[1][name].double())
                value.mul_(mask.get(name, 1))
            logits = point(split.images.double())
        assert pair["train_loss"][k] == pytest.approx(F.cross_entropy(logits, split.labels).item(), rel=1e-5)
        assert pair["test_accuracy"][k] == pytest.approx((logits.argmax(1) == split.labels).double().mean())


def test_ends_of_the_line_are_the_trained_networks():
    states = [common.build_network(CONFIG, seed).state_dict() for seed in (1, 2)]
    split, model = noise_split(50), common.build_network(CONFIG)
    pair = stability.walk(model, *states, (split, split), 3)
    for k, state in ((0, states[0]), (-1, states[1])):
        model.load_state_dict(state)
        own = common.evaluate(model, split)
        assert (pair["train_loss"][k], pair["train_accuracy"][k]) == (pytest.approx(own.loss, rel=1e-6), own.accuracy)


def test_network_with_itself_has_no_barrier():
    state, split = common.build_network(CONFIG, 1).state_dict(), noise_split(50)
    pair = stability.walk(common.build_network(CONFIG), state, state, (split, split), 11)
    assert all(abs(value) < 1e-6 for value in stability.barriers(pair).values())


def test_batchnorm_recompute_is_a_fresh_statistics_pass():
    config = CONFIG | {"norm": "batch"}
    model, split = common.build_network(config, 1), noise_split(40)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    recomputed = stability.walk(common.build_network(config), state, state, (split, split), 3, refresh=split)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.  # one batch: the new statistics are its own
    model.train()(split.images)
    assert recomputed["train_loss"] == pytest.approx([common.evaluate(model, split).loss] * 3, rel=1e-5)


# Weight matching


def test_assignment_equals_brute_force():
    random = np.random.default_rng(0)
    for n, trial in itertools.product(range(1, 7), range(5)):
        cost = random.normal(size=(n, n)) if trial else random.integers(0, 3, (n, n)).astype(float)  # with ties
        best = min(sum(cost[i, p[i]] for i in range(n)) for p in itertools.permutations(range(n)))
        found = stability.assignment(cost)
        assert sorted(found) == list(range(n)) and cost[range(n), found].sum() == pytest.approx(best)


@pytest.mark.parametrize("changes", [{}, {"norm": "batch"}, {"model": "resnet10", "width": 8}])
def test_relabelled_copy_is_the_same_function_and_matching_undoes_it(changes, tmp_path):
    config = CONFIG | {"width": 8, "train_images": None} | changes
    split, scratch = splits.load_real(config, tmp_path)[0], common.build_network(config)
    model = common.build_network(config, 1)
    recipe = common.Recipe(6, lr=.1, augment="none", cutmix=0)
    common.train(model, split, recipe, common.random_stream(0), half_mask(model))
    a, groups = model.state_dict(), stability.permutation_groups(model)
    b = {name: value.clone() for name, value in a.items()}
    for k, group in enumerate(groups):
        b = stability.permute(b, group, torch.randperm(len(a[group[0][0]]), generator=common.random_stream(k)))
    scratch.load_state_dict(b)
    images = split.batch(slice(0, 50))[0]
    torch.testing.assert_close(scratch.eval()(images), model.eval()(images), rtol=1e-4, atol=1e-4)
    matched = stability.match_weights(a, b, groups, common.random_stream(0))
    before, after = (stability.barriers(stability.walk(scratch, a, end, (split, split), 5)) for end in (b, matched))
    assert before["barrier_train_loss"] > .1 and before["barrier_test_error"] > .3
    assert abs(after["barrier_train_loss"]) < 1e-5 and after["barrier_test_error"] == 0
    assert all(torch.equal(matched[name], a[name]) for name in common.prunable(model))


def test_align_refuses_networks_whose_units_it_does_not_know():
    with pytest.raises(UserError, match="convnet3, resnet10 and resnet18"):
        stability.permutation_groups(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))


# End points


def trained(folder, ticket, order, **options):
    split = splits.load_real(dict(ticket["config"]), folder)[0]
    return tickets.endpoint(folder, folder / "r3.pt", ticket, split, order, **options)


def test_interrupted_training_ends_bit_identical(tmp_path, monkeypatch):
    ticket, real_train, clock = subnetwork(eval_epochs=4), common.train, itertools.count(0, 60)
    whole = trained(tmp_path / "whole", ticket, 1)
    calls = iter(range(2))

    def interrupted(*arguments):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real_train(*arguments)

    monkeypatch.setattr(tickets.time, "monotonic", lambda: next(clock))  # a minute for each epoch: saved every time
    monkeypatch.setattr(common, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", ticket, 1)
    monkeypatch.setattr(common, "train", real_train)
    resumed = trained(tmp_path / "parts", ticket, 1)
    assert all(torch.equal(resumed["state"][name], value) for name, value in whole["state"].items())
    assert "momenta" not in resumed and all((resumed["state"][n][~m] == 0).all() for n, m in ticket["masks"].items())


def test_orders_share_their_first_epochs_and_the_schedule(tmp_path):
    ticket = subnetwork()
    split = splits.load_real(dict(ticket["config"]), tmp_path)[0]
    model, recipe = common.build_network(ticket["config"]), common.recipe_of(ticket["config"], 2)
    model.load_state_dict(ticket["init"])
    first = common.train(model, split, recipe, common.random_stream(0, "order", None), ticket["masks"], (0, 1))
    common.train(model, split, recipe, common.random_stream(0, "order", 1), ticket["masks"], (1, 2), first.momenta)
    shared = [trained(tmp_path, ticket, order, shared=1)["state"] for order in (0, 1)]
    assert all(torch.equal(shared[1][name], value) for name, value in model.state_dict().items())
    assert not torch.equal(shared[0]["conv1.weight"], shared[1]["conv1.weight"])


def test_same_command_again_computes_nothing_and_writes_the_same(mask_file, tmp_path, monkeypatch):
    command = ("--mask", mask_file, "--points", 3, "--eval-images", 50, "--out", tmp_path / "out")
    run(monkeypatch, *command)
    files = [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".pt", ".json", ".csv")]
    written = {path: path.read_bytes() for path in files}
    assert sorted(path.name for path in written) == ["r3.json", "r3_order0.pt", "r3_order1.pt", "stability.csv"]
    monkeypatch.setattr(common, "train", None)
    monkeypatch.setattr(common, "evaluate_points", None)
    run(monkeypatch, *command)
    assert all(path.read_bytes() == content for path, content in written.items())


def test_end_points_of_another_mask_are_refused_or_overwritten(mask_file, tmp_path, monkeypatch):
    command = ("--mask", mask_file, "--points", 3, "--out", tmp_path / "out")
    run(monkeypatch, *command)
    common.save(mask_file, subnetwork(seed=1))
    with pytest.raises(UserError, match="end point of another mask"):
        run(monkeypatch, *command)
    run(monkeypatch, *command, "--overwrite")
    common.save(mask_file, subnetwork(seed=1, lr=.01))
    with pytest.raises(UserError, match="end point of lr 0.05, not 0.01"):
        run(monkeypatch, *command)


@pytest.mark.parametrize("arguments, message", [
    (["--orders", 1], "--orders.*at least 2"),
    (["--points", 1], "--points.*at least 3"),
    (["--from-epoch", 2], "less than the 2 epochs"),
    (["--compare", "OTHER"], "model resnet10, .*r3.pt convnet3"),
    (["--compare", "."], "no r0.pt"),
    (["--compare", "ABSENT"], "no such file"),
])
def test_bad_input_is_one_line_and_writes_nothing(mask_file, tmp_path, monkeypatch, arguments, message):
    common.save(tmp_path / "OTHER", subnetwork(model="resnet10", width=2))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run(monkeypatch, "--mask", mask_file, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_absent_dataset_is_named_with_its_folder(tmp_path, monkeypatch):
    def no_network(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", no_network)
    common.save(tmp_path / "r3.pt", subnetwork(dataset="cifar10", image_size=32, channels=3))
    with pytest.raises(UserError, match=f"cifar10 not found in {tmp_path}"):
        run(monkeypatch, "--mask", tmp_path / "r3.pt", "--data-dir", tmp_path)


# Summary


def saved_result(path, data, sparsity, accuracy, losses):
    config = CONFIG | {"data": data}
    pair = {"orders": "0-1", "train_loss": losses, "test_loss": losses, "test_accuracy": [accuracy] * 3,
            "train_error": [0.] * 3, "test_error": [1 - accuracy] * 3}
    settings = dict(model="convnet3", dataset="digits", images=5000, epochs=2, from_epoch=0, bn="lerp", align=False)
    common.save(path, {"format": stability.FORMAT, "mask": path.name, "family": tickets.family(config), "round": 4,
                       "sparsity": sparsity, "settings": settings, "config": config,
                       "pairs": [pair | stability.barriers(pair)]})


def test_summary_compares_with_imp(tmp_path, monkeypatch):
    saved_result(tmp_path / "imp.json", "real", .59, .8, [1., 3., 1.])
    saved_result(tmp_path / "synthetic0.json", "distilled", .59, .6, [1., 1.5, 3.])
    saved_result(tmp_path / "synthetic1.json", "distilled", .59, .68, [1., 3.5, 3.])
    rows = stability.summary_rows(stability.read_results([tmp_path]))
    assert rows["IMP", 1] == [(59, (2, 0), (3, 0), (1, 0))]
    [(percent, difference, ratio, accuracy)] = rows["synthetic, 10 a class", 50]
    assert (percent, difference[0], ratio[0], accuracy[0]) == pytest.approx((59, .5, 1.25, .8))
    assert (difference[1], ratio[1], accuracy[1]) == pytest.approx((2 ** .5, 2 ** .5 / 2, .1 / 2 ** .5))
    run(monkeypatch, "--summary", tmp_path, "--out", tmp_path)
    assert (tmp_path / "summary.png").stat().st_size > 10_000
    saved_result(tmp_path / "far.json", "distilled", .87, .5, [1., 1., 1.])
    with pytest.raises(UserError, match="no IMP .* at 87%"):
        run(monkeypatch, "--summary", tmp_path, "--out", tmp_path)
