"""Planes through points of weight space, in coefficients of their states: a point is a weighted sum of the states.

The loss around networks of one architecture, on any split:

    plane = planes.make_plane("three", [network.state_dict() for network in networks])
    [(xs, ys)] = planes.square_grids([plane], 25)
    scores = evaluation.evaluate_points(model, plane.states, plane.grid(xs, ys), [split])
    losses = np.array([row[0].loss for row in scores]).reshape(25, 25)  # of ys and xs
"""
import math
from typing import NamedTuple

import numpy as np
import torch

from .errors import UserError
from .streams import random_stream

STATES_NEEDED = {"three": 3, "pca": 3, "paper": 4, "random": 1}  # of each kind; landscape.py says what they are
MARGIN = .4  # what a grid shows around the states, as a part of their extent


class Plane(NamedTuple):
    """A plane of combinations of M states: the place (x, y) has coefficients base + x axes[0] + y axes[1]."""

    kind: str
    names: list  # of the parameters, which distances are about
    states: list  # M state dicts: those that were given, and random directions
    base: np.ndarray  # [M]
    axes: np.ndarray  # [2, M]; combined with the states, two vectors of length 1
    projections: np.ndarray  # [given, 2] coordinates of the given states' projections
    residuals: np.ndarray  # [given] their distances from the plane
    explained: float  # fraction of their variance that lies in the plane

    def coefficients(self, coordinates):
        """[K, 2] coordinates -> [K, M] coefficients, for evaluation.evaluate_points."""
        return self.base + np.asarray(coordinates) @ self.axes

    def grid(self, xs, ys):
        """The coefficients [ys * xs, M] of a grid, row by row along y."""
        return self.coefficients(np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2))


def make_plane(kind, states, names=None, stream=None):
    """The Plane of a kind (see STATES_NEEDED) for states that are masked already; `names` are the parameters.

    By default all floating-point values but BatchNorm's statistics. Buffers take part in the combinations but not in
    distances. `stream`, a generator, draws random directions. Raises UserError when the states span no plane.
    """
    if names is None:
        statistics = "running_mean", "running_var"
        names = [name for name, v in states[0].items() if v.is_floating_point() and not name.endswith(statistics)]
    count = len(states)
    if kind == "random":
        stream = stream or random_stream(0, "plane")
        states = states + [random_direction(states[0], names, stream) for _ in range(2)]
    inner = gram(states, names)
    base, directions = base_and_directions(kind, inner, count)
    axes = orthonormal(directions, inner)
    if kind == "paper":
        axes = np.array([direction / math.sqrt(direction @ inner @ direction) for direction in directions])
    offsets = np.eye(len(states))[:count] - base
    projections = np.linalg.solve(axes @ inner @ axes.T, axes @ inner @ offsets.T).T
    missed = offsets - projections @ axes
    residuals = np.sqrt(np.maximum(np.einsum("mi,ij,mj->m", missed, inner, missed), 0))
    total = variance(offsets, inner)
    explained = 1 - variance(missed, inner) / total if total else 1.
    return Plane(kind, names, states, base, axes, projections, residuals, explained)


def vectors(states, names):
    """The states' tensors `names` as rows [M, P]."""
    return torch.stack([torch.cat([state[name].flatten() for name in names]) for state in states])


def gram(states, names):
    """Inner products [M, M] of the states' tensors `names`, in float64."""
    rows = vectors(states, names).double()
    return (rows @ rows.T).cpu().numpy()


def base_and_directions(kind, inner, count):
    """(base [M], two directions [M]) in coefficients of M states with inner products `inner`, `count` of them given."""
    unit = np.eye(len(inner))
    if kind == "pca":
        centre = np.eye(count) - 1 / count
        _, principal = np.linalg.eigh(centre @ inner @ centre)
        return np.full(count, 1 / count), principal[:, [-1, -2]].T @ centre
    if kind == "random":
        return unit[0], unit[count:]
    return unit[0], (unit[1] - unit[0], unit[2] - unit[0] if kind == "three" else unit[3] - unit[2])


def orthonormal(directions, inner):
    """Gram-Schmidt on coefficient vectors under the inner product a @ inner @ b. UserError when they are parallel."""
    basis = []
    for direction in directions:
        length = math.sqrt(max(direction @ inner @ direction, 0))
        for earlier in basis * 2:  # twice is enough for full precision
            direction = direction - (direction @ inner @ earlier) * earlier
        rest = math.sqrt(max(direction @ inner @ direction, 0))
        if rest <= 1e-6 * max(length, 1e-30):
            raise UserError("the networks are identical or on one line: they span no plane")
        basis.append(direction / rest)
    return np.array(basis)


def variance(rows, inner):
    """Sum of the squared distances of coefficient vectors, the rows, from their mean."""
    centred = rows - rows.mean(0)
    return np.trace(centred @ inner @ centred.T)


def random_direction(state, names, stream):
    """Gaussian, each filter scaled to the norm of the network's own (Li et al. 2018); 0 for biases, norms, buffers.

    Pruned weights stay 0: the direction is masked like the state.
    """
    direction = {name: torch.zeros_like(value) for name, value in state.items()}
    for name in names:
        weight = state[name]
        if weight.ndim > 1:
            noise = torch.randn(weight.shape, generator=stream).to(weight) * (weight != 0)
            norms = [v.flatten(1).norm(dim=1).view(-1, *[1] * (v.ndim - 1)) for v in (weight, noise)]
            direction[name] = noise * norms[0] / norms[1].clamp(min=1e-12)
    return direction


def square_grids(planes, size):
    """(xs [size], ys [size]) for each plane of one kind: squares of one side for all, around the projections.

    Those of random planes lie around the network and reach as far as its norm.
    """
    corners = [(plane.projections.min(0), plane.projections.max(0)) for plane in planes]
    centres = [(low + high) / 2 for low, high in corners]
    half = (.5 + MARGIN) * max((high - low).max() for low, high in corners)
    if planes[0].kind == "random":
        centres = [plane.projections[0] for plane in planes]
        half = max(math.sqrt(gram(plane.states[-1:], plane.names)[0, 0]) for plane in planes)
    steps = np.linspace(-half, half, size)
    return [(x + steps, y + steps) for x, y in centres]
