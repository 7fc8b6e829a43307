"""Weight matching: the units of one network relabelled to lie near those of another (Ainsworth et al. 2023)."""
import numpy as np
import torch

from .errors import UserError
from .networks import blocks_of


def permutation_groups(model):
    """Lists of (tensor name, axis) whose units may be relabelled together without changing the network's function.

    Norms, ReLU and pooling act on each channel alone, so a group is what makes a channel (axis 0) and what reads it
    (axis 1); channels that a residual addition ties together form one group. Raises UserError for other networks.
    """
    blocks = blocks_of(model)
    if blocks is None:
        raise UserError("--align knows the units of convnet3, resnet10 and resnet18 only")
    state = model.state_dict()

    def made_by(layer):
        parts = ("weight", "bias", "running_mean", "running_var")
        names = [f"{module}.{part}" for module in (layer.conv, layer.norm) for part in parts]
        return [(name, 0) for name in names if name in state]

    def read_by(layer):
        return [(f"{layer.conv}.weight", 1)]

    groups = []
    stream = []  # the group of the channels that flow from block to block; at first those of the images
    for block in blocks:
        for layer, reader in zip(block.layers, block.layers[1:]):
            groups.append(made_by(layer) + read_by(reader))
        stream = stream + read_by(block.layers[0])
        if block.shortcut:
            groups.append(stream + read_by(block.shortcut))
            stream = made_by(block.shortcut)
        elif not block.residual:
            groups.append(stream)
            stream = []
        stream = stream + made_by(block.layers[-1])
    groups.append(stream + [("linear.weight", 1)])
    return groups[1:]  # the first one is the images', which stay as they are


def permute(state, group, order):
    """`state` with the units of `group` in a new order; an axis that flattens pixels moves them in blocks."""
    order = torch.as_tensor(order, device=state[group[0][0]].device)
    permuted = dict(state)
    for name, axis in group:
        units = permuted[name].unflatten(axis, (len(order), -1))
        permuted[name] = units.index_select(axis, order).flatten(axis, axis + 1)
    return permuted


def similarity(a, b, group):
    """Inner products [n, n] of all weights of unit i in `a` with those of unit j in `b`, float64."""
    n = len(a[group[0][0]])

    def rows(state, name, axis):
        return state[name].double().unflatten(axis, (n, -1)).movedim(axis, 0).reshape(n, -1)

    return sum(rows(a, name, axis) @ rows(b, name, axis).T for name, axis in group if "running" not in name)


def assignment(cost):
    """The column of each row that minimises the total of a square cost [n, n]: exact, O(n^3).

    Shortest augmenting paths with dual prices (Jonker & Volgenant 1987); SciPy's linear_sum_assignment is the same,
    and neither PyTorch nor NumPy has one.
    """
    n = len(cost)
    row_price = np.zeros(n + 1)
    column_price = np.zeros(n + 1)
    row_of = np.zeros(n + 1, int)  # of each column, rows counted from 1; column 0 holds the row to be placed
    for row in range(1, n + 1):
        row_of[0] = row
        column = 0
        shortest = np.full(n + 1, np.inf)  # from column 0 to each column,
        previous = np.zeros(n + 1, int)  # by way of this one
        done = np.zeros(n + 1, bool)
        while row_of[column]:
            done[column] = True
            current = row_of[column]
            reduced = np.r_[np.inf, cost[current - 1] - row_price[current] - column_price[1:]]
            better = ~done & (reduced < shortest)
            shortest[better] = reduced[better]
            previous[better] = column
            column = int(np.where(done, np.inf, shortest).argmin())
            step = shortest[column]
            row_price[row_of[done]] += step
            column_price[done] -= step
            shortest[~done] -= step
        while column:  # a free one: every row on the path moves up by a column
            row_of[column] = row_of[previous[column]]
            column = previous[column]
    return row_of[1:].argsort()


def match_weights(a, b, groups, generator):
    """State `b` with its units relabelled to lie near `a`: Ainsworth et al. 2023, Algorithm 1.

    One group at a time, in random order, gets its best permutation given the others, until none improves. Masked
    weights move with their units, so the mask of the result is the permuted mask.
    """
    improved = True
    while improved:
        improved = False
        for index in torch.randperm(len(groups), generator=generator).tolist():
            gains = similarity(a, b, groups[index]).cpu().numpy()
            order = assignment(-gains)
            best = gains[np.arange(len(order)), order].sum()
            if best > np.trace(gains) + 1e-9 * np.abs(gains).max():
                b = permute(b, groups[index], order)
                improved = True
    return b
