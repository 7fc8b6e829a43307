"""landscape.py on surfaces known in closed form, and on small networks."""
import itertools
import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from samples import half_mask
from torch import nn

import landscape
from common import evaluation, files, planes, tickets
from common.data import load_real
from common.errors import UserError
from common.masks import apply_mask
from common.networks import build_network
from common.streams import random_stream

CONFIG = dict(model="convnet3", dataset="digits", width=4, norm=None, image_size=8, channels=1, num_classes=10, seed=0,
              train_images=200, data="real", ipc=10, eval_epochs=1, lr=.05, momentum=.9, weight_decay=5e-4,
              batch_size=64, augment="dsa", cutmix=.5, flip=False)


def toy_states(count=4, size=6):
    rows = torch.randn(count, size, generator=random_stream(0))
    return [{"w": row[:4].view(2, 2), "b": row[4:]} for row in rows]


def flat(state):
    return np.concatenate([state["w"].numpy().ravel(), state["b"].numpy()]).astype(float)


def networks(count=4, **changes):
    """States of masked networks, their mask, and a network to load them."""
    config = CONFIG | changes
    built = [build_network(config, seed) for seed in range(count)]
    mask = half_mask(built[0])
    for network in built:
        apply_mask(network, mask)
        for module in network.modules():  # running variances apart, so that extrapolating them goes below zero
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.copy_(torch.rand(module.running_var.shape) + .01)
    return [network.state_dict() for network in built], mask, build_network(config)


def save_ticket(path, **changes):
    [state], mask, _ = networks(1, **changes)
    files.save(path, tickets.make_ticket(3, mask, state, CONFIG | changes, {}))
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["landscape.py", *map(str, arguments)])
    landscape.main()


# ---------------------------------------------------------------- planes


@pytest.mark.parametrize("kind", ["three", "pca", "random"])
@pytest.mark.parametrize("states", [toy_states(), networks()[0]])
def test_basis_is_orthonormal_and_residuals_are_true_distances(kind, states):
    plane = planes.make_plane(kind, states)
    rows = planes.vectors(plane.states, list(states[0])).double().numpy()
    basis, origin = plane.axes @ rows, plane.base @ rows
    assert np.allclose(basis @ basis.T, np.eye(2), atol=1e-6)
    for m, (coordinates, residual) in enumerate(zip(plane.projections, plane.residuals)):
        offset = rows[m] - origin
        assert coordinates == pytest.approx(basis @ offset, abs=1e-6)
        assert residual == pytest.approx(np.linalg.norm(offset - (basis @ offset) @ basis), abs=1e-5)


def test_plane_three_holds_three_states_exactly():
    plane = planes.make_plane("three", toy_states())
    assert plane.residuals[:3] == pytest.approx([0, 0, 0], abs=1e-6) and plane.residuals[3] > .1
    assert plane.coefficients(plane.projections[:3]) == pytest.approx(np.eye(4)[:3], abs=1e-9)


def test_plane_pca_explains_what_numpy_svd_says():
    states = toy_states()
    rows = np.array([flat(state) for state in states])
    singular = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
    plane = planes.make_plane("pca", states)
    assert plane.explained == pytest.approx((singular[:2] ** 2).sum() / (singular ** 2).sum(), rel=1e-6)


def test_plane_paper_holds_two_states():
    plane = planes.make_plane("paper", toy_states())
    assert plane.residuals[:2] == pytest.approx([0, 0], abs=1e-6) and (plane.residuals[2:] > .1).all()


def test_random_directions_have_the_filters_norms_and_keep_the_mask():
    [state], mask, network = networks(1)
    names = [name for name, _ in network.named_parameters()]
    direction = planes.random_direction(state, names, random_stream(0))
    for name, kept in mask.items():
        norms = [v[name].flatten(1).norm(dim=1) for v in (direction, state)]
        torch.testing.assert_close(*norms)
        assert (direction[name][~kept] == 0).all()
    assert (direction["norm1.bias"] == 0).all()


def test_identical_states_span_no_plane():
    states = toy_states()
    with pytest.raises(UserError, match="no plane"):
        planes.make_plane("three", [states[0], states[1], states[1]])


def test_distances_are_of_parameters_not_of_statistics():
    states, _, network = networks(norm="batch")
    assert planes.make_plane("three", states).names == [name for name, _ in network.named_parameters()]


def test_surface_around_networks_of_ones_own():
    own = [nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)) for _ in range(3)]
    split, _ = load_real(dict(CONFIG), "nowhere")
    plane = planes.make_plane("three", [network.state_dict() for network in own])
    [(xs, ys)] = planes.square_grids([plane], 5)
    scratch = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))
    coefficients = np.concatenate([plane.grid(xs, ys), np.eye(3)])
    losses = [row[0].loss for row in evaluation.evaluate_points(scratch, plane.states, coefficients, [split])]
    assert losses[25:] == pytest.approx([evaluation.evaluate(network, split).loss for network in own], rel=1e-5)
    origin, (x_axis, y_axis) = own[0].state_dict(), plane.axes
    place = {name: origin[name] + xs[1] * evaluation.combine(plane.states, x_axis)[name]
             + ys[3] * evaluation.combine(plane.states, y_axis)[name] for name in origin}
    scratch.load_state_dict(place)
    assert np.reshape(losses[:25], (5, 5))[3, 1] == pytest.approx(evaluation.evaluate(scratch, split).loss, rel=1e-4)


# ---------------------------------------------------------------- surfaces


def quadratic(plane, coefficients):
    """Loss (w - c)' A (w - c) of each point, as a score."""
    random = np.random.default_rng(1)
    a, c = random.normal(size=(6, 6)), random.normal(size=6)
    points = coefficients @ np.array([flat(state) for state in plane.states]) - c
    return [(value, .5, .1) for value in np.einsum("ki,ij,kj->k", points, a @ a.T, points)]


def everywhere(coefficients):
    return np.ones(len(coefficients), bool)


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(landscape, "draw_surface", lambda *arguments: None)


def toy_survey(path, scorer, size=9, earlier=None):
    plane = planes.make_plane("three", toy_states())
    grids = planes.square_grids([plane], size)
    about = {"labels": np.array(["toy"]), "settings": np.array(json.dumps({"on": "real", "num_classes": 10}))}
    about |= landscape.arrays_of([plane], grids)
    landscape.survey(path, [plane], grids, [partial(scorer, plane)], [everywhere], about, earlier)
    return plane, landscape.read_surface(path)


def test_quadratic_surface_is_reproduced(tmp_path, no_pictures):
    plane, surface = toy_survey(tmp_path / "landscape.npz", quadratic)
    basis = plane.axes @ np.array([flat(state) for state in plane.states])
    random = np.random.default_rng(1)
    a, c = random.normal(size=(6, 6)), random.normal(size=6)
    for (i, y), (j, x) in itertools.product(enumerate(surface["ys"][0]), enumerate(surface["xs"][0])):
        offset = flat(plane.states[0]) + x * basis[0] + y * basis[1] - c
        assert surface["losses"][0, i, j] == pytest.approx(offset @ a @ a.T @ offset, rel=1e-6)
    losses, barriers, rises = landscape.read_probes(surface["probes"][0, :, 0], 4)
    assert losses == pytest.approx([score[0] for score in quadratic(plane, np.eye(4))])
    assert (barriers == 0).all()  # a convex loss
    curvature = basis @ a @ a.T @ basis.T  # a circle's mean rise is r**2 / 2 times the trace, around any point
    assert rises == pytest.approx(np.tile(np.trace(curvature) / 2 * np.square(landscape.RADII), (4, 1)), rel=1e-6)


def test_diverged_endpoints_are_refused_and_nothing_is_written(tmp_path, no_pictures):
    def diverged(plane, coefficients):
        return np.full((len(coefficients), 3), np.nan)

    with pytest.raises(UserError, match="an endpoint: the loss is nan"):
        toy_survey(tmp_path / "landscape.npz", diverged)
    assert not list(tmp_path.iterdir())


def test_barrier_matrix_reads_the_lines():
    losses = np.array([1., 3., 2.] + [2.] * 9 + [9.] * 9 + [0.] * 9 + [0.] * 3 * 3 * 8)
    _, barriers, _ = landscape.read_probes(losses, 3)
    assert barriers[0, 1] == pytest.approx(2 - 1.2) and barriers[2, 0] == pytest.approx(9 - 1.1) and barriers[1, 2] == 0


def test_area_below_a_level_is_a_disc():
    xs = np.linspace(-2, 2, 401)
    area, share = landscape.area_below(xs ** 2 + xs[:, None] ** 2, xs, xs, 1.)
    assert area == pytest.approx(np.pi, rel=.01) and share == pytest.approx(np.pi / 16, rel=.02)


@pytest.mark.parametrize("size", [9, 10, 25])
def test_every_point_comes_once_and_coarse_ones_first(size):
    levels = landscape.coarse_to_fine(size)
    assert sorted(np.concatenate(levels)) == list(range(size * size))
    assert len(levels[0]) == len(range(0, size, 8)) ** 2


def test_resumed_survey_equals_uninterrupted_bit_for_bit(tmp_path, no_pictures):
    whole = toy_survey(tmp_path / "whole.npz", quadratic)[1]
    calls = itertools.count()

    def stopping(plane, coefficients):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return quadratic(plane, coefficients)

    path = tmp_path / "parts.npz"
    with pytest.raises(KeyboardInterrupt):
        toy_survey(path, stopping)
    earlier = landscape.unpack(landscape.read_surface(path))
    assert 0 < earlier[1].sum() < earlier[1].size
    parts = toy_survey(path, quadratic, earlier=earlier)[1]
    assert all(np.array_equal(parts[key], whole[key]) for key in whole)


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("kind", ["three", "pca", "paper", "random"])
def test_masks_hold_at_every_point_and_endpoints_keep_their_own_loss(kind):
    states, mask, network = networks()
    split = load_real(dict(CONFIG), "nowhere")[0]
    plane = planes.make_plane(kind, states)
    for weights in plane.coefficients([(0, 0), (1.5, -2), (-3, .5)]):
        point = evaluation.combine(plane.states, weights.tolist())
        assert all((point[name][~kept] == 0).all() for name, kept in mask.items())
    inside = [m for m in range(4) if plane.residuals[m] < 1e-4]
    assert len(inside) == {"three": 3, "pca": 0, "paper": 2, "random": 1}[kind]
    for m in inside:
        coefficients = plane.coefficients(plane.projections[m:m + 1])
        [score] = landscape.score_points(network, plane, mask, split, None, coefficients)
        network.load_state_dict(states[m])
        assert score.loss == pytest.approx(evaluation.evaluate(network, split).loss, rel=1e-5)


def test_interpolated_statistics_stay_in_the_hull_or_never_negative():
    plane = planes.make_plane("three", networks(norm="batch")[0])
    points = plane.coefficients(np.random.default_rng(0).normal(size=(200, 2)) * np.abs(plane.projections).max())
    hull = landscape.allowed(plane, "lerp", False, points)
    further = landscape.allowed(plane, "lerp", True, points)
    assert hull.sum() < further.sum() < 200 and (further | ~hull).all()
    for weights, fine in zip(points, further):
        point = evaluation.combine(plane.states, weights.tolist())
        variances = [value for name, value in point.items() if name.endswith("running_var")]
        assert fine == all((v >= -1e-7).all() for v in variances)
    assert landscape.allowed(plane, "recompute", False, points).all()


# ---------------------------------------------------------------- the command


def test_command_resumes_redraws_and_refuses_other_settings(tmp_path, monkeypatch, capsys):
    folders = ("--out", tmp_path / "out", "--endpoints", tmp_path / "ends")
    command = ("--mask", save_ticket(tmp_path / "r3.pt"), "--grid", 9, "--eval-images", 20, *folders)
    run(monkeypatch, *command)
    path = tmp_path / "out" / "landscape.npz"
    surface = landscape.read_surface(path)
    assert np.isfinite(surface["losses"]).all() and surface["losses"].shape == (1, 9, 9)
    monkeypatch.setattr(evaluation, "evaluate_points", None)  # everything is there already
    run(monkeypatch, *command)
    (tmp_path / "out" / "landscape.png").unlink()
    run(monkeypatch, "--plot", path)
    assert (tmp_path / "out" / "landscape.png").exists()
    assert "loss below" in capsys.readouterr().out
    with pytest.raises(UserError, match="surface of other plane"):
        run(monkeypatch, *command, "--plane", "pca")
    settings = json.loads(str(surface["settings"]))
    settings["masks"][0].insert(9, "auto")  # earlier versions also wrote how zeros were skipped
    files.save(path, surface | {"settings": json.dumps(settings)})
    run(monkeypatch, *command)


@pytest.mark.parametrize("arguments, message", [
    (["--orders", 2], "needs 3 endpoints"),
    (["--plane", "paper", "--orders", 3], "needs 4 endpoints"),
    (["--mask", "r3.pt", "other.pt"], "model resnet10, .*r3.pt convnet3"),
    (["--plot", "r3.pt"], "not a surface"),
    (["--plot", "old.npz"], "not a surface of this version"),
])
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    save_ticket(tmp_path / "r3.pt")
    save_ticket(tmp_path / "other.pt", model="resnet10", width=8)
    files.save(tmp_path / "old.npz", {"format": np.array("lottery-landscape-0")})
    with pytest.raises(UserError, match=message):
        run(monkeypatch, "--mask", "r3.pt", *arguments)
    assert not (tmp_path / "runs").exists()
