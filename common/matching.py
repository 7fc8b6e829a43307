"""Weight matching: the units of one network relabelled to lie near those of another (Ainsworth et al. 2023)."""
import numpy as np
import torch

from .symmetries import permute


def similarity(a, b, group):
    """Inner products [n, n] of all weights of unit i in `a` with those of unit j in `b`, float64."""
    def rows(state, part):
        weights = state[part.name].narrow(part.axis, part.start, part.stop - part.start).double()
        return weights.unflatten(part.axis, (group.size, -1)).movedim(part.axis, 0).reshape(group.size, -1)

    return sum(rows(a, part) @ rows(b, part).T for part in group.parts if "running" not in part.name)


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
