"""stability.py against closed forms, brute force and networks with a known symmetry."""
import itertools
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from samples import half_mask
from torch import nn

import stability
from common import endpoints, evaluation, files, matching, symmetries, tickets, training
from common.data import Split, load_real
from common.errors import UserError
from common.networks import build_network, prunable
from common.streams import random_stream

CONFIG = dict(model="convnet3", dataset="digits", width=4, norm=None, image_size=8, channels=1, num_classes=10,
              seed=0, train_images=200, data="real", ipc=10, eval_epochs=2, lr=.05, momentum=.9, weight_decay=5e-4,
              batch_size=64, augment="dsa", cutmix=.5, flip=False)


def noise_split(n):
    return Split(torch.randn(n, 1, 8, 8, generator=random_stream(0)), torch.arange(n) % 10)


def make_ticket(seed=0, **changes):
    config = CONFIG | changes
    model = build_network(config, seed)
    return tickets.make_ticket(3, half_mask(model), model.state_dict(), config, {})


@pytest.fixture
def mask_file(tmp_path):
    files.save(tmp_path / "masks" / "r3.pt", make_ticket())
    return tmp_path / "masks" / "r3.pt"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["stability.py", *map(str, arguments)])
    stability.main()


# ---------------------------------------------------------------- barriers


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
    curves = stability.line(Product(), a, b, [split, split])
    expected = [math.log1p(math.exp(-(s * (1 - 2 * alpha)) ** 2)) for alpha in np.linspace(0, 1, 11)]
    assert curves["train_loss"] == pytest.approx(expected, rel=1e-5)
    height = math.log(2) - math.log1p(math.exp(-s * s))
    assert stability.barriers(curves)["barrier_test_loss"] == pytest.approx(height, rel=1e-5)


# ---------------------------------------------------------------- lines between networks


@pytest.mark.parametrize("changes", [{}, {"model": "resnet10", "width": 2}])
def test_line_equals_networks_interpolated_by_hand_with_pruned_weights_zero(changes):
    networks = [build_network(CONFIG | changes, seed) for seed in (1, 2)]
    mask, split = half_mask(networks[0]), noise_split(20)
    states = [network.state_dict() for network in networks]
    curves = stability.line(build_network(CONFIG | changes), *states, [split, split], 5, mask)
    for k, alpha in enumerate((0, .25, .5, .75, 1)):
        point = build_network(CONFIG | changes).double().eval()
        with torch.no_grad():
            for name, value in point.state_dict().items():
                value.copy_((1 - alpha) * states[0][name].double() + alpha * states[1][name].double())
                value.mul_(mask.get(name, 1))
            logits = point(split.images.double())
        assert curves["train_loss"][k] == pytest.approx(F.cross_entropy(logits, split.labels).item(), rel=1e-5)
        assert curves["test_accuracy"][k] == pytest.approx((logits.argmax(1) == split.labels).double().mean())


def test_ends_of_the_line_are_the_trained_networks():
    states = [build_network(CONFIG, seed).state_dict() for seed in (1, 2)]
    split, model = noise_split(50), build_network(CONFIG)
    curves = stability.line(model, *states, [split], 3)
    for k, state in ((0, states[0]), (-1, states[1])):
        model.load_state_dict(state)
        own = evaluation.evaluate(model, split)
        assert curves["train_loss"][k] == pytest.approx(own.loss, rel=1e-6)
        assert curves["train_accuracy"][k] == own.accuracy


def test_network_with_itself_has_no_barrier():
    state, split = build_network(CONFIG, 1).state_dict(), noise_split(50)
    curves = stability.line(build_network(CONFIG), state, state, [split, split])
    assert all(abs(value) < 1e-6 for value in stability.barriers(curves).values())


def test_batchnorm_recompute_is_a_fresh_statistics_pass():
    config = CONFIG | {"norm": "batch"}
    model, split = build_network(config, 1), noise_split(40)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    recomputed = stability.line(build_network(config), state, state, [split], 3, refresh=split)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.  # one batch: the new statistics are its own
    model.train()(split.images)
    assert recomputed["train_loss"] == pytest.approx([evaluation.evaluate(model, split).loss] * 3, rel=1e-5)


# ---------------------------------------------------------------- weight matching


def test_assignment_equals_brute_force():
    random = np.random.default_rng(0)
    for n, trial in itertools.product(range(1, 7), range(5)):
        cost = random.normal(size=(n, n)) if trial else random.integers(0, 3, (n, n)).astype(float)  # with ties
        best = min(sum(cost[i, p[i]] for i in range(n)) for p in itertools.permutations(range(n)))
        found = matching.assignment(cost)
        assert sorted(found) == list(range(n)) and cost[range(n), found].sum() == pytest.approx(best)


@pytest.mark.parametrize("changes", [{}, {"norm": "batch"}, {"model": "resnet10", "width": 8}])
def test_relabelled_copy_is_the_same_function_and_matching_undoes_it(changes, tmp_path):
    config = CONFIG | {"width": 8, "train_images": None} | changes
    split, scratch = load_real(config, tmp_path)[0], build_network(config)
    model = build_network(config, 1)
    recipe = training.Recipe(6, lr=.1, augment="none", cutmix=0)
    training.train(model, split, recipe, random_stream(0), half_mask(model))
    a, groups = model.state_dict(), symmetries.permutation_groups(model, split.batch(slice(2))[0])
    b = {name: value.clone() for name, value in a.items()}
    for k, group in enumerate(groups):
        b = symmetries.permute(b, group, torch.randperm(group.size, generator=random_stream(k)))
    scratch.load_state_dict(b)
    images = split.batch(slice(0, 50))[0]
    torch.testing.assert_close(scratch.eval()(images), model.eval()(images), rtol=1e-4, atol=1e-4)
    matched = matching.match_weights(a, b, groups, random_stream(0))
    before, after = (stability.barriers(stability.line(scratch, a, end, [split, split], 5)) for end in (b, matched))
    assert before["barrier_train_loss"] > .1 and before["barrier_test_error"] > .3
    assert abs(after["barrier_train_loss"]) < 1e-5 and after["barrier_test_error"] == 0
    assert all(torch.equal(matched[name], a[name]) for name in prunable(model))


# ---------------------------------------------------------------- endpoints


def trained(folder, ticket, order, **options):
    split = load_real(dict(ticket["config"]), folder)[0]
    return endpoints.endpoint(folder, "r3", ticket, split, order, **options)


def test_interrupted_training_ends_bit_identical(tmp_path, monkeypatch):
    ticket, real_save, saved = make_ticket(eval_epochs=4), files.save, itertools.count(1)
    whole = trained(tmp_path / "whole", ticket, 1)

    def save_then_stop(path, value):
        real_save(path, value)
        if next(saved) == 7:  # within the second epoch
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.Autosave, "due", lambda autosave: True)  # saved at every step
        patch.setattr(files, "save", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "parts", ticket, 1)
    [path] = (tmp_path / "parts").rglob("r3_order1.pt")
    assert files.load(path)["epochs_done"] == 1
    resumed = trained(tmp_path / "parts", ticket, 1)
    assert all(torch.equal(resumed["state"][name], value) for name, value in whole["state"].items())
    assert resumed.keys() == whole.keys()
    assert all((resumed["state"][name][~kept] == 0).all() for name, kept in ticket["masks"].items())


def test_orders_share_their_first_epochs_and_the_schedule(tmp_path):
    ticket = make_ticket()
    split = load_real(dict(ticket["config"]), tmp_path)[0]
    model, recipe = build_network(ticket["config"]), training.recipe_of(ticket["config"], 2)
    model.load_state_dict(ticket["init"])
    first = training.train(model, split, recipe, random_stream(0, "order", None), ticket["masks"], until=1)
    training.train(model, split, recipe, random_stream(0, "order", 1), ticket["masks"], training=first)
    shared = [trained(tmp_path, ticket, order, shared=1)["state"] for order in (0, 1)]
    assert all(torch.equal(shared[1][name], value) for name, value in model.state_dict().items())
    assert not torch.equal(shared[0]["conv1.weight"], shared[1]["conv1.weight"])


def test_what_earlier_versions_began_is_gone_on_with(tmp_path):
    ticket = make_ticket()
    whole = trained(tmp_path, ticket, 1, shared=1)["state"]
    [begun], [finished] = (list(tmp_path.rglob(name)) for name in ("r3_epoch1.pt", "r3_order1.pt"))
    held = files.load(begun)
    held["momenta"] = held.pop("training")["momenta"]
    files.save(begun, held)
    finished.unlink()
    again = trained(tmp_path, ticket, 1, shared=1)["state"]
    assert all(torch.equal(again[name], value) for name, value in whole.items())


# ---------------------------------------------------------------- the command


def test_same_command_again_computes_nothing_and_writes_the_same(mask_file, tmp_path, monkeypatch):
    command = ("--mask", mask_file, "--points", 3, "--eval-images", 50, "--out", tmp_path / "out")
    run(monkeypatch, *command)
    paths = [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".pt", ".json", ".csv")]
    written = {path: path.read_bytes() for path in paths}
    names = sorted(path.name for path in written)
    assert names == ["curves.csv", "r3.json", "r3_order0.pt", "r3_order1.pt", "stability.csv"]
    monkeypatch.setattr(training, "train", None)
    monkeypatch.setattr(evaluation, "evaluate_points", None)
    run(monkeypatch, *command)
    assert all(path.read_bytes() == content for path, content in written.items())


def test_results_that_also_say_how_zeros_were_skipped_are_taken(mask_file, tmp_path, monkeypatch):
    command = ("--mask", mask_file, "--points", 3, "--eval-images", 50, "--out", tmp_path / "out")
    run(monkeypatch, *command)
    [path] = (tmp_path / "out").rglob("*.json")
    result = files.load(path)
    files.save(path, result | {"settings": result["settings"] | {"sparse": "auto"}})  # as earlier versions did
    monkeypatch.setattr(evaluation, "evaluate_points", None)
    run(monkeypatch, *command)
    assert "sparse" not in (tmp_path / "out" / "stability.csv").read_text().splitlines()[0].split(",")


def test_families_with_the_same_ticket_measure_it_once(mask_file, tmp_path, monkeypatch):
    twin = tmp_path / "twin" / "r3.pt"
    files.save(twin, make_ticket(data="distilled"))
    run(monkeypatch, "--mask", mask_file, "--compare", twin, "--points", 3, "--out", tmp_path / "out")
    assert [path.parent.name for path in (tmp_path / "out").rglob("*.json")] == ["masks"]


def test_a_ticket_that_is_there_twice_counts_once_and_keeps_its_family(mask_file, tmp_path, monkeypatch, capsys):
    for name, changes in ("copy", {}), ("twin", {"scope": "layer"}):
        files.save(tmp_path / name / "r3.pt", make_ticket(**changes))
    masks = [mask_file, tmp_path / "copy" / "r3.pt", tmp_path / "twin" / "r3.pt"]
    run(monkeypatch, "--mask", *masks, "--points", 3, "--eval-images", 50, "--out", tmp_path / "out")
    spread = capsys.readouterr().out.partition("family  ")[2].splitlines()[1:3]
    assert [line.split("%")[1].split()[0] for line in spread] == ["1", "1"]  # pairs
    assert "scope None" in spread[0] and "scope layer" in spread[1]


class Activated(nn.Sequential):
    def __init__(self, activation):
        super().__init__(nn.Flatten(), nn.Linear(64, 10), activation)


def test_an_endpoint_of_another_network_with_the_same_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoints, "build_network", lambda config: Activated(getattr(nn, config["model"])()))
    state = Activated(nn.ReLU()).state_dict()
    mask = {"1.weight": torch.ones(10, 64, dtype=torch.bool)}
    ticket = tickets.make_ticket(0, mask, state, CONFIG | {"model": "ReLU"}, {})
    endpoints.endpoint(tmp_path, "r0", ticket, noise_split(20), 0)
    ticket["config"]["model"] = "Tanh"
    with pytest.raises(UserError, match="an endpoint of model ReLU, not Tanh"):
        endpoints.endpoint(tmp_path, "r0", ticket, noise_split(20), 0)


def test_end_points_of_another_mask_are_refused_or_overwritten(mask_file, tmp_path, monkeypatch):
    command = ("--mask", mask_file, "--points", 3, "--out", tmp_path / "out")
    run(monkeypatch, *command)
    files.save(mask_file, make_ticket(seed=1))
    with pytest.raises(UserError, match="end ?point of another mask"):
        run(monkeypatch, *command)
    run(monkeypatch, *command, "--overwrite")
    files.save(mask_file, make_ticket(seed=1, lr=.01))
    with pytest.raises(UserError, match="end ?point of lr 0.05, not 0.01"):
        run(monkeypatch, *command)


@pytest.mark.parametrize("arguments, message", [
    (["--orders", 1], "--orders.*at least 2"),
    (["--points", 1], "--points.*at least 3"),
    (["--from-epoch", 2], "less than the 2 epochs"),
    (["--compare", "OTHER"], "model resnet10, .*r3.pt convnet3"),
    (["--compare", "."], "no r0.pt"),
    (["--compare", "ABSENT"], "no such file"),
    (["--summary", "list.json"], "not a result of stability.py"),
])
def test_bad_input_is_one_line_and_writes_nothing(mask_file, tmp_path, monkeypatch, arguments, message):
    files.save(tmp_path / "OTHER", make_ticket(model="resnet10", width=2))
    files.save(tmp_path / "list.json", [1])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run(monkeypatch, "--mask", mask_file, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_absent_dataset_is_named_with_its_folder(tmp_path, monkeypatch):
    def no_network(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", no_network)
    files.save(tmp_path / "r3.pt", make_ticket(dataset="cifar10", image_size=32, channels=3))
    with pytest.raises(UserError, match=f"cifar10 not found in {tmp_path}"):
        run(monkeypatch, "--mask", tmp_path / "r3.pt", "--data-dir", tmp_path)


# ---------------------------------------------------------------- the summary


def save_result(path, data, sparsity, accuracy, losses):
    config = CONFIG | {"data": data}
    pair = {"orders": "0-1", "train_loss": losses, "test_loss": losses, "test_accuracy": [accuracy] * 3,
            "train_error": [0.] * 3, "test_error": [1 - accuracy] * 3}
    settings = dict(model="convnet3", dataset="digits", images=5000, epochs=2, from_epoch=0, bn="lerp", align=False,
                    mask_sha=path.name)
    files.save(path, {"format": stability.FORMAT, "mask": path.name, "family": tickets.family(config), "round": 4,
                      "sparsity": sparsity, "settings": settings, "config": config,
                      "pairs": [pair | stability.barriers(pair)]})


def test_summary_compares_with_imp(tmp_path, monkeypatch):
    save_result(tmp_path / "imp.json", "real", .59, .8, [1., 3., 1.])
    save_result(tmp_path / "synthetic0.json", "distilled", .59, .6, [1., 1.5, 3.])
    save_result(tmp_path / "synthetic1.json", "distilled", .59, .68, [1., 3.5, 3.])
    rows = stability.summary_rows(stability.read_results([tmp_path]))
    assert rows["IMP", 1] == [(59, (2, 0), (3, 0), (1, 0))]
    [(percent, difference, ratio, accuracy)] = rows["synthetic, 10 a class", 50]
    assert (percent, difference[0], ratio[0], accuracy[0]) == pytest.approx((59, .5, 1.25, .8))
    assert (difference[1], ratio[1], accuracy[1]) == pytest.approx((2 ** .5, 2 ** .5 / 2, .1 / 2 ** .5))
    run(monkeypatch, "--summary", tmp_path, "--out", tmp_path)
    assert (tmp_path / "summary.png").stat().st_size > 10_000
    save_result(tmp_path / "far.json", "distilled", .87, .5, [1., 1., 1.])
    with pytest.raises(UserError, match="no IMP .* at 87%"):
        run(monkeypatch, "--summary", tmp_path, "--out", tmp_path)
