"""The loss surface around trained tickets: Figure 5 of the paper.

    python landscape.py --mask masks/r8.pt                                            one ticket, 100 x 100 points
    python landscape.py --mask masks_real/r0.pt masks_real/r9.pt masks_distilled/r9.pt    dense, IMP, synthetic (Fig. 5)
    python landscape.py --plot runs/landscape/landscape.npz                           redraw
    python landscape.py --dataset digits --grid 25                                    offline demonstration

Trains (or takes from --endpoints, where stability.py leaves them) four endpoints of the ticket, one for each data
order, and evaluates the training loss on a grid in a plane. Four generic points span three dimensions, so no plane
holds all four: what a plane misses is drawn hollow, with its distance from the plane. Axes are in true distance of
parameters.

    --plane three   exactly through the first three endpoints (Gram-Schmidt); the fourth is projected
    --plane pca     the two main directions of all endpoints, none of them exactly in it
    --plane paper   as in the released code two of four endpoints lie in it and its axes are not orthogonal: through 0
                    and 1, second axis along 3 - 2; distances are true along each axis only
    --plane random  two random filter-normalised directions around endpoint 0 (Li et al. 2018, Sec. 4)

Beside it: the loss barrier of each pair of endpoints (as in stability.py), how much the loss rises at fixed distances
from each, and the area below a loss level. In --out: landscape.npz (landscape_test.npz for --on test), contours and a
surface as pictures, redrawn at 13, 25, 50 and 100 points a side. After a stop the same command goes on.

As a library, for networks of one's own: common/planes.py.
"""
if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is quiet while PyTorch is imported

import itertools
import json
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common import cli, evaluation, files, ranks, tickets
from common.bars import Bar
from common.data import fixed_subset
from common.distilled import distilled_of
from common.endpoints import Endpoints
from common.errors import UserError, note
from common.figures import figure_of
from common.networks import build_network
from common.planes import STATES_NEEDED, make_plane, square_grids, vectors
from common.streams import random_stream

FORMAT = "lottery-landscape-1"
RADII = .5, 1., 2.  # distances at which the loss's rise is measured
ALPHAS = np.linspace(0, 1, 11)[1:-1]  # the inner points of a line

#############################################
#        Points, and what they tell         #
#############################################


def probes(plane):
    """Coefficients of what is measured beside the grid: the endpoints, 9 inner points of each pair's line, circles.

    A circle has 8 directions in the plane and lies around the endpoint itself, whether or not the plane holds it.
    """
    count = len(plane.projections)
    unit = np.eye(len(plane.base))[:count]
    lines = [(1 - alpha) * a + alpha * b for a, b in itertools.combinations(unit, 2) for alpha in ALPHAS]
    angles = np.arange(8) * math.pi / 4
    ring = np.stack([np.cos(angles), np.sin(angles)], 1) @ plane.axes
    circles = [centre + radius * step for centre in unit for radius in RADII for step in ring]
    return np.array([*unit, *lines, *circles])


def read_probes(losses, count):
    """(losses [count], barriers [count, count], rises [count, radii]) from the losses at the probes."""
    ends, rest = losses[:count], losses[count:]
    pairs = list(itertools.combinations(range(count), 2))
    barriers = np.zeros((count, count))
    for (i, j), line in zip(pairs, rest[:9 * len(pairs)].reshape(-1, 9)):
        barriers[i, j] = max((line - (1 - ALPHAS) * ends[i] - ALPHAS * ends[j]).max(), 0)
        barriers[j, i] = barriers[i, j]
    circles = rest[9 * len(pairs):].reshape(count, len(RADII), 8)
    return ends, barriers, circles.mean(2) - ends[:, None]


def area_below(losses, xs, ys, level):
    """(area in squared parameter distance, fraction of the grid) of the cells whose loss is below `level`."""
    below = int((losses < level).sum())
    return below * float((xs[1] - xs[0]) * (ys[1] - ys[0])), below / losses.size


def allowed(plane, bn, extrapolate, coefficients):
    """Which points [K] BatchNorm's interpolated statistics permit: all when recomputed, else those in the convex hull.

    With `extrapolate` also those beyond, as long as no variance is negative.
    """
    variances = [name for name in plane.states[0] if name.endswith("running_var")]
    if bn == "recompute" or not variances:
        return np.ones(len(coefficients), bool)
    if extrapolate:
        return (coefficients @ vectors(plane.states, variances).cpu().numpy() >= 0).all(1)
    return (coefficients >= -1e-9).all(1)


#############################################
#               The survey                  #
#############################################


def coarse_to_fine(size):
    """Flat indices of a size x size grid, level by level: every 8th point of a side, every 4th, every 2nd, all."""
    levels = []
    seen = np.zeros((size, size), bool)
    for stride in (8, 4, 2, 1):
        wanted = np.zeros_like(seen)
        wanted[::stride, ::stride] = True
        levels.append(np.flatnonzero(wanted & ~seen))
        seen |= wanted
    return levels


def survey(path, planes, grids, scorers, permits, about, earlier=None):
    """Evaluate probes and grids of S planes, coarse to fine, into `path` (see pack), with pictures after each level.

    scorers[s](coefficients [K, M]) -> K rows (loss, accuracy, standard error of the loss); where permits[s](them) is
    False they stay NaN. `earlier` = (scores, done) of an interrupted survey; a stop loses half a minute.
    """
    size = len(grids[0][0])
    coefficients = np.stack([np.concatenate([probes(plane), plane.grid(*grid)]) for plane, grid in zip(planes, grids)])
    coefficients = ranks.broadcast(coefficients).numpy()  # those of two machines may differ by rounding
    scores, done = earlier or (np.full((*coefficients.shape[:2], 3), np.nan), np.zeros(coefficients.shape[:2], bool))
    for s, permit in enumerate(permits):
        done[s] |= ~permit(coefficients[s])
    first = done.shape[1] - size ** 2  # the grid's first point, after the probes
    autosave = files.Autosave()

    def save():
        files.save(path, pack(scores, done, about, size))

    with Bar("surface", done.size, int(done.sum()), "point") as bar:
        def progress(count):
            bar.update(count)
            if autosave.due():
                save()

        for level in [np.arange(first), *(first + indices for indices in coarse_to_fine(size))]:
            if done[:, level].all():
                continue
            for s, scorer in enumerate(scorers):
                score_level(level, coefficients[s], scorer, scores[s], done[s], progress)
            for plane, found in zip(planes, scores):
                evaluation.check_losses(found[:len(plane.projections), 0], "an endpoint")
            save()
            if level[0] >= first and not done.all() and ranks.current().size == 1:  # the caller draws the last picture
                draw_surface(pack(scores, done, about, size), path.parent, path.stem)


def score_level(level, coefficients, scorer, scores, done, progress):
    """Fill in the scores [K, 3] of a plane's points `level` that are not `done`; progress(points) after every batch.

    A batch takes about ten seconds, but no more than 64 points a rank, of which each scores an equal part.
    """
    count, batch = ranks.current().size, 4
    todo = level[~done[level]]
    while len(todo):
        part, todo = todo[:batch * count], todo[batch * count:]
        start = time.monotonic()
        scores[part] = score_together(scorer, coefficients[part])
        done[part] = True
        seconds = float(ranks.broadcast(time.monotonic() - start))
        batch = int(np.clip(10 * len(part) / count / max(seconds, 1e-3), 1, 64))
        progress(len(part))


def score_together(scorer, coefficients):
    """scorer(coefficients) [K, 3], of which each rank computes its part."""
    own = ranks.own_part()
    found = np.zeros((len(coefficients), 3))
    if len(found[own]):
        found[own] = scorer(coefficients[own])
    return ranks.sum_over_ranks_(torch.from_numpy(found)).numpy()


def score_points(model, plane, mask, split, refresh, coefficients):
    """Scores [K] of points on `split`; `refresh`, a split, gives BatchNorm's statistics at each. `model` is scratch."""
    rows = evaluation.evaluate_points(model, plane.states, coefficients.tolist(), [split], mask, refresh)
    return [row[0] for row in rows]


#############################################
#          File, table, pictures            #
#############################################


def arrays_of(planes, grids):
    """What landscape.npz holds of S planes: where their endpoints lie, and their grids."""
    sides = np.array(grids)  # [S, 2, n]
    return {"models": np.array([plane.projections for plane in planes]),
            "residuals": np.array([plane.residuals for plane in planes]),
            "explained": np.array([plane.explained for plane in planes]), "xs": sides[:, 0], "ys": sides[:, 1]}


def pack(scores, done, about, size):
    """The contents of landscape.npz: `about` and scores [S, probes + n * n, 3] as arrays by name."""
    grid = scores[:, -size * size:].reshape(-1, size, size, 3)
    return about | {"format": FORMAT, "losses": grid[..., 0], "accuracies": grid[..., 1], "loss_errors": grid[..., 2],
                    "probes": scores[:, :-size * size], "done": done}


def unpack(surface):
    """(scores, done) of the contents of landscape.npz."""
    grid = np.stack([surface[key] for key in ("losses", "accuracies", "loss_errors")], -1)
    return np.concatenate([surface["probes"], grid.reshape(len(grid), -1, 3)], 1), surface["done"]


def read_surface(path):
    """The arrays of landscape.npz. Raises UserError for another file or version."""
    return files.load_format(path, FORMAT, f"not a surface of this version of landscape.py ({FORMAT})")


def earlier_scores(path, settings, overwrite):
    """(scores, done) of the surface in `path`; None without one, or to `overwrite` another's. Raises UserError."""
    if not path.exists():
        return None
    surface = read_surface(path)
    earlier = json.loads(str(surface["settings"]))
    skipping = "auto", "on", "off"  # in recipes of earlier versions: how zeros were skipped, no more than rounding
    earlier["masks"] = [[value for value in recipe if value not in skipping] for recipe in earlier["masks"]]
    earlier.setdefault("model", settings["model"])  # earlier versions did not say
    different = files.difference(earlier, settings)
    if different and not overwrite:
        raise UserError(f"{path} is a surface of other {different}; --overwrite replaces it, or choose another --out")
    return None if different else unpack(surface)


def finest(surface):
    """The stride of the finest grid level of which every point is done; None before the first."""
    losses = surface["losses"]
    grid = surface["done"][:, -losses[0].size:].reshape(losses.shape)
    return next((stride for stride in (1, 2, 4, 8) if grid[:, ::stride, ::stride].all()), None)


def print_surface(surface):
    """Per ticket: its endpoints, the barriers between them, how sharp they lie; and the area of low loss."""
    count, stride = surface["models"].shape[1], finest(surface)
    results = [read_probes(scores[:, 0], count) for scores in surface["probes"]]
    level = 1.25 * max(ends.max() for ends, _, _ in results)
    for s, (ends, barriers, rises) in enumerate(results):
        print(f"\n{surface['labels'][s]}: the plane holds {surface['explained'][s]:.1%} of the endpoints' variance")
        print("order               loss accuracy off plane    barrier to" + "".join(f" {m:>6}" for m in range(count))
              + "    rise at distance" + "".join(f"{radius:>8}" for radius in RADII))
        for m, (_, accuracy, error) in enumerate(surface["probes"][s, :count]):
            print(f"{m:>5} {ends[m]:>9.4f} ± {error:.4f} {accuracy:>8.2%} {surface['residuals'][s, m]:>9.3f}{'':13}",
                  *(f"{height:>6.3f}" for height in barriers[m]), " " * 18, *(f"{rise:>7.4f}" for rise in rises[m]))
        losses, xs, ys = (surface[key][s] for key in ("losses", "xs", "ys"))
        area, share = area_below(losses[::stride, ::stride], xs[::stride], ys[::stride], level)
        print(f"loss below {level:.3f} (1.25 x the highest endpoint's): area {area:.2f}, {share:.1%} of the picture")


def draw_surface(surface, out, stem):
    """Fig. 5: <stem>.png, contours of the loss, and <stem>_surface.png; one logarithmic scale for all tickets."""
    stride, settings = finest(surface), json.loads(str(surface["settings"]))
    if stride is None:
        raise UserError("no level of the grid is finished yet: give the command that began it again")
    losses = surface["losses"][:, ::stride, ::stride]
    lowest = max(np.nanmin(losses), 1e-6)
    cap = min(max(np.nanmax(losses), 1.1 * lowest), max(4 * math.log(settings["num_classes"]), 2 * lowest))
    ticks = np.geomspace(lowest, cap, 7)
    legend = f"{settings['on'].replace('real', 'training')} loss, log scale, capped at {cap:.3g}"
    flat, plans = figure_of(len(losses), 5, 5, margin=1.2)
    solid, reliefs = figure_of(len(losses), 5, 5, margin=1.2, subplot_kw={"projection": "3d"})
    for s, heights in enumerate(losses):
        xs, ys = surface["xs"][s, ::stride], surface["ys"][s, ::stride]
        plans[s].set(title=surface["labels"][s])
        reliefs[s].set(title=surface["labels"][s])
        filled = draw_contours(plans[s], xs, ys, heights, lowest, cap)
        mark_endpoints(plans[s], surface["models"][s], surface["residuals"][s], xs[-1] - xs[0])
        sheet = draw_relief(reliefs[s], xs, ys, np.clip(heights, lowest, cap), ticks)
    flat.colorbar(filled, ax=plans, shrink=.8, label=legend, ticks=ticks, format="%.3g")
    bar = solid.colorbar(sheet, ax=reliefs, shrink=.6, pad=.04, label=legend, ticks=np.log10(ticks))
    bar.ax.set_yticklabels([f"{tick:.3g}" for tick in ticks])
    files.save(out / f"{stem}.png", flat)
    files.save(out / f"{stem}_surface.png", solid)


def draw_contours(axes, xs, ys, losses, lowest, cap):
    """Losses [ys, xs] from `lowest` to `cap` as filled contours on a logarithmic scale, every third of them a line."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    levels = np.geomspace(lowest, cap, 19)
    filled = axes.contourf(xs, ys, np.maximum(losses, lowest), levels, norm=LogNorm(lowest, cap), extend="max",
                           cmap=colormaps["viridis"].with_extremes(over="#fffde0"))
    axes.contour(xs, ys, np.clip(losses, lowest, cap), levels[::3], colors="black", linewidths=.4)
    axes.set(xlabel="distance in parameter space", aspect="equal", facecolor=".7")
    return filled


def draw_relief(axes, xs, ys, losses, ticks):
    """Losses [ys, xs] as a surface on a logarithmic scale, from the first of the `ticks` to the last."""
    low, high = np.log10(ticks[[0, -1]])
    sheet = axes.plot_surface(*np.meshgrid(xs, ys), np.log10(losses), cmap="viridis", rcount=60, ccount=60, vmin=low,
                              vmax=high, linewidth=0)
    axes.set(zlim=(low, high))
    axes.set_zticks(np.log10(ticks), [f"{tick:.3g}" for tick in ticks])
    axes.view_init(elev=38, azim=-60)
    axes.tick_params(labelsize=7)
    return sheet


def mark_endpoints(axes, coordinates, residuals, extent):
    """Endpoints by their order: a full marker in the plane, a hollow one with its distance beside it."""
    from matplotlib.patheffects import withStroke

    for order, ((x, y), distance) in enumerate(zip(coordinates, residuals)):
        face = "white" if distance < 1e-3 * extent else "none"
        for edge, width in (("white", 3), ("black", 1)):
            axes.plot(x, y, "o", markersize=13, markerfacecolor=face, markeredgecolor=edge, markeredgewidth=width)
        axes.annotate(f"{order}", (x, y), ha="center", va="center", fontsize=9, weight="bold",
                      path_effects=[withStroke(linewidth=2.5, foreground="white")])
        if face == "none":
            axes.annotate(f"{distance:.2g} off the plane", (x, y), xytext=(10, 8), textcoords="offset points",
                          fontsize=8, bbox=dict(boxstyle="round", facecolor="white", alpha=.85, linewidth=0))


#############################################
#                Command line               #
#############################################


def parse(argv=None):
    parser = cli.Parser(__doc__)
    cli.ticket_flags(parser)
    flag = parser.add_argument_group("the plane").add_argument
    flag("--plane", choices=tuple(STATES_NEEDED), default="three", help="see above (three)")
    flag("--orders", type=cli.at_least(1, 1000), default=4, help="endpoints, one for each data order (4)")
    flag("--grid", type=cli.at_least(9, 2000), default=100, help="points along a side (100)")
    flag("--on", choices=("real", "test", "distilled"), default="real",
         help="data of the loss: training, test or the distilled set of the first synthetic mask (real)")
    flag("--eval-images", type=cli.at_least(2), metavar="N", help="random N of them, always the same (all)")
    flag("--bn", choices=("recompute", "lerp"), default="recompute",
         help="BatchNorm statistics: at each point those of 1,000 training images, or interpolated, points outside "
              "the convex hull of the endpoints left blank (recompute)")
    flag("--extrapolate", action="store_true", help="--bn lerp beyond it; blank if a variance is negative")
    flag = parser.add_argument_group("output").add_argument
    flag("--endpoints", type=cli.folder, default=Path("runs/stability"), help="trained tickets (runs/stability)")
    flag("--out", type=cli.folder, default=Path("runs/landscape"), help="folder of results (runs/landscape)")
    flag("--overwrite", action="store_true", help="replace another surface and other endpoints")
    flag("--plot", type=Path, metavar="FILE", help="draw this landscape.npz again, without computing")
    return parser.parse_args(argv)


def settings_of(endpoints):
    """All that the surface of the tickets depends on. Raises UserError for fewer endpoints than a plane needs."""
    args = endpoints.args
    if args.orders < STATES_NEEDED[args.plane]:
        raise UserError(f"--orders {args.orders}: --plane {args.plane} needs {STATES_NEEDED[args.plane]} endpoints")
    masks = []
    for path, ticket in endpoints.ticket_at.items():
        config = ticket["config"]
        masks.append([tickets.fingerprint(ticket), config["seed"], *endpoints.recipe(path)])
    flags = ("plane", "orders", "grid", "on", "eval_images", "bn", "extrapolate", "seed")
    shared = {key: config.get(key) for key in ("model", "num_classes", "data_fingerprint")}
    return {key: getattr(args, key) for key in flags} | shared | {"masks": masks}


def distilled_split(chosen, train):
    """The distilled set that the first synthetic ticket was found on, or the embedded one. Raises UserError."""
    configs = [ticket["config"] for ticket in chosen]
    config = next((config for config in configs if config["data"] == "distilled"), configs[0])
    split = distilled_of(config, train.mean, train.std, train.labels.device)
    if split.labels.ndim == 2:
        note("the distilled set's labels are soft; losses are those of the likeliest classes")
    return split.hard()


def show(path):
    """Draw and print a surface, finished or not; the pictures go beside its file."""
    surface = read_surface(path)
    draw_surface(surface, path.parent, path.stem)
    print_surface(surface)


def main():
    args = parse()
    if args.plot:
        return show(args.plot)
    ticket_at, train, test = tickets.load_tickets(args.mask, args, cli.start(args))
    endpoints = Endpoints(args.endpoints, ticket_at, train, args)
    settings = settings_of(endpoints)
    with files.owned(args.out):
        experiment(endpoints, settings, test)


def experiment(endpoints, settings, test):
    """Survey the planes of all tickets' endpoints, print and draw what was found."""
    args, ticket_at, train = endpoints.args, endpoints.ticket_at, endpoints.split
    file = args.out / ("landscape.npz" if args.on == "real" else f"landscape_{args.on}.npz")
    chosen = list(ticket_at.values())
    earlier = earlier_scores(file, settings, args.overwrite)
    split = test if args.on == "test" else train
    if args.on == "distilled":
        split = distilled_split(chosen, train)
    split = fixed_subset(split, args.eval_images, "evaluate")
    model = build_network(chosen[0]["config"]).to(train.labels.device)
    has_batchnorm = any(name.endswith("running_var") for name in model.state_dict())
    refresh = fixed_subset(train, 1000, "batchnorm") if has_batchnorm and args.bn == "recompute" else None
    endpoints.train_ahead(ticket_at, args.orders)
    names = [name for name, _ in model.named_parameters()]
    planes = []
    for path in ticket_at:
        states = [endpoints.state(path, order) for order in range(args.orders)]
        planes.append(make_plane(args.plane, states, names, random_stream(args.seed or 0, "plane")))
    grids = square_grids(planes, args.grid)
    about = arrays_of(planes, grids) | {"labels": tickets.labels(chosen), "settings": json.dumps(settings)}
    scorers = [partial(score_points, model, plane, ticket["masks"], split, refresh)
               for plane, ticket in zip(planes, chosen)]
    permits = [partial(allowed, plane, args.bn, args.extrapolate) for plane in planes]
    survey(file, planes, grids, scorers, permits, about, earlier)
    if ranks.is_first():
        show(file)
        print(f"written: {file} and pictures")


if __name__ == "__main__":
    cli.run(main)
