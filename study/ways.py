"""The released code's own ways on the same endpoints: how much of the contrast do they make?

    python study/ways.py --scale cpu

masked        the right way: both endpoints masked, all of a network rewound between rounds
unmasked      its line runs through weights that are not masked: a pruned slot holds what weight decay left of its
              initial value, in both endpoints alike
weights       another search, which rewinds only conv and linear weights: biases and norms keep their trained values
interpolated  of a network with batch norm: its line runs through interpolated running statistics
refreshed     the right way there: the statistics of 2,000 training images, at every point of the line

Its fourth way, the training loss of IMP beside the validation loss of synthetic masks, is read off the columns.
"""
import math
import sys

import networks
import runs

sys.path.insert(0, str(runs.ROOT))

import stability  # noqa: E402
from common import files  # noqa: E402
from common.data import load_real  # noqa: E402
from common.networks import build_network  # noqa: E402
from common.tickets import load_ticket  # noqa: E402
from common.training import Recipe  # noqa: E402


def main():
    study = runs.study(__doc__)
    families = runs.families(study, "imp", "synthetic", "published")
    cells = [(family, search) for search in ("preset", "hot") for family in families]
    rounds = study.scale.rounds[:1]
    runs.find_masks(study, "imp", "weights")
    for cell in cells:
        runs.find_masks(study, *cell)
    rows = [row | {"way": "masked"} for row in runs.lines(study, cells, rounds)]
    rows += [row | {"way": "weights"} for row in runs.lines(study, [("imp", "weights")], rounds)]
    rows += [row | {"way": "unmasked"} for row in remeasured(study, runs.tickets(study, cells, rounds), unmasked_line)]
    runs.write(study, "ways", rows + batch_norm_rows(study))


def batch_norm_rows(study):
    """Rows of the two ways of a network with batch norm."""
    study = runs.with_network(study, "batch")
    cells = networks.cells(study)
    for cell in cells[1:]:
        runs.find_masks(study, *cell)
    rows = [row | {"way": "interpolated"} for row in runs.lines(study, cells)]
    return rows + [row | {"way": "refreshed"} for row in remeasured(study, runs.tickets(study, cells), refreshed_line)]


def remeasured(study, masks, line):
    """Rows of the lines between the same endpoints, drawn by `line`."""
    row_of = {row["mask"]: row for row in runs.read(study.work / "endpoints" / "stability.csv")}
    rows, real = [], None
    for path in masks:
        ticket = load_ticket(path)
        real = real or load_real(dict(ticket["config"]), study.data_dir, "cpu")
        folder = study.work / "endpoints" / path.parent.parent.name / path.parent.name
        settings = files.load(folder / f"{path.stem}.json")["settings"]
        ends = [files.load(folder / f"{path.stem}_order{order}.pt")["state"] for order in (0, 1)]
        pair = line(ticket, ends, *real, settings)
        heights = {height: str(pair[height]) for height in pair if "barrier" in height}
        rows.append(runs.line_row(row_of[str(path)] | heights))
    return rows


def unmasked_line(ticket, ends, train, test, settings):
    """stability.py's line with what is left of the initial values where the masks removed weights."""
    recipe = Recipe(**{key: settings[key] for key in Recipe._fields})
    left = decayed(recipe, math.ceil(settings["images"] / recipe.batch_size))
    states = [filled(state, ticket, left) for state in ends]
    return stability.lines(build_network(ticket["config"]), states, None, None, train, test, settings)[0]


def refreshed_line(ticket, ends, train, test, settings):
    """stability.py's line with BatchNorm's statistics estimated anew at every point."""
    model, settings = build_network(ticket["config"]), settings | {"bn": "recompute"}
    return stability.lines(model, ends, ticket["masks"], None, train, test, settings)[0]


def filled(state, ticket, left):
    """`state` with `left` of the initial values where the mask removed a weight."""
    return state | {name: state[name] + left * ticket["init"][name] * ~kept for name, kept in ticket["masks"].items()}


def decayed(recipe, steps):
    """What weight decay leaves of a weight that has no gradient, after epochs of so many steps of momentum SGD."""
    weight, momentum = 1., 0.
    for epoch in range(recipe.epochs):
        for _ in range(steps):
            momentum = recipe.momentum * momentum + recipe.weight_decay * weight
            weight -= recipe.learning_rate(epoch) * momentum
    return weight


if __name__ == "__main__":
    main()
