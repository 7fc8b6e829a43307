"""The loss surface around trained subnetworks: Figure 5 of the paper.

    python landscape.py --mask masks/r8.pt                                            one subnetwork, 100 x 100 points
    python landscape.py --mask masks_real/r0.pt masks_real/r9.pt masks_distilled/r9.pt    dense, IMP, synthetic (Fig. 5)
    python landscape.py --plot runs/landscape/landscape.npz                           redraw
    python landscape.py --dataset digits --grid 25                                    offline demonstration

Trains (or takes from --endpoints, where stability.py leaves them) four copies of the subnetwork under four data orders
and evaluates the training loss on a grid in a plane. Four generic models span three dimensions, so no plane holds all
four: what a plane misses is drawn hollow, with its distance from the plane. Axes are in true distance of parameters.

    --plane three   exactly through the first three models (Gram-Schmidt); the fourth is projected
    --plane pca     the two main directions of all models, none of them exactly in it
    --plane paper   as in the released code two of four models lie in it and its axes are not orthogonal: through 0 and
                    1, second axis along model 3 - model 2; distances are true along each axis only
    --plane random  two random filter-normalised directions around model 0 (Li et al. 2018, Sec. 4)

Beside it: the loss barrier of each pair of models (as in stability.py), how much the loss rises at fixed distances from
each model, and the area below a loss level. In --out: landscape.npz (landscape_test.npz for --on test), contours and a
surface as pictures, redrawn at 13, 25, 50 and 100 points a side. After a stop the same command goes on.
"""
import itertools
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import common
import ranks
import splits
import tickets
from common import UserError, at_least

FORMAT = "lottery-landscape-1"
RADII, MARGIN = (.5, 1., 2.), .4  # distances at which the loss's rise is measured; what surrounds the models
MODELS_NEEDED = {"three": 3, "pca": 3, "paper": 4, "random": 1}

#############################################
#                  Planes                   #
#############################################


class Plane(NamedTuple):
    """A plane of combinations of M states: the point (x, y) has coefficients base + x axes[0] + y axes[1]."""

    states: list  # M state dicts, already masked
    base: np.ndarray  # [M]
    axes: np.ndarray  # [2, M]; combined with the states, two vectors of length 1
    models: np.ndarray  # [models, 2] coordinates of the models' projections
    residuals: np.ndarray  # [models] their distances from the plane
    explained: float  # fraction of the models' variance that lies in the plane

    def coefficients(self, points):
        """[K, 2] coordinates -> [K, M] coefficients."""
        return self.base + np.asarray(points) @ self.axes


def vectors(states, names):
    """The states' tensors `names` as rows [M, P]."""
    return torch.stack([torch.cat([state[name].flatten() for name in names]) for state in states])


def gram(states, names):
    """Inner products [M, M] of the states' tensors `names`, in float64."""
    rows = vectors(states, names).double()
    return (rows @ rows.T).cpu().numpy()


def orthonormal(directions, inner):
    """Gram-Schmidt on coefficient vectors under the inner product a @ inner @ b. UserError when they are parallel."""
    basis = []
    for direction in directions:
        length = math.sqrt(max(direction @ inner @ direction, 0))
        for earlier in basis * 2:  # twice is enough for full precision
            direction = direction - (direction @ inner @ earlier) * earlier
        rest = math.sqrt(max(direction @ inner @ direction, 0))
        if rest <= 1e-6 * max(length, 1e-30):
            raise UserError("the models are identical or on one line: they span no plane")
        basis.append(direction / rest)
    return np.array(basis)


def make_plane(kind, states, names, stream=None):
    """The Plane of `kind` (three, pca, paper, random) for masked states; `names` are the parameters.

    Buffers take part in the combinations but not in distances. Raises UserError when the models span no plane.
    """
    count = len(states)
    if kind == "random":
        states = states + [random_direction(states[0], names, stream) for _ in range(2)]
    inner, unit = gram(states, names), np.eye(len(states))
    base = np.full(count, 1 / count) if kind == "pca" else unit[0]
    if kind == "pca":
        centre = np.eye(count) - 1 / count
        variances, vectors = np.linalg.eigh(centre @ inner @ centre)
        directions = vectors[:, [-1, -2]].T @ centre
    elif kind == "random":
        directions = unit[count:]
    else:
        directions = unit[1] - unit[0], (unit[2] - unit[0] if kind == "three" else unit[3] - unit[2])
    axes = orthonormal(directions, inner)
    if kind == "paper":
        axes = np.array([direction / math.sqrt(direction @ inner @ direction) for direction in directions])
    offsets = unit[:count] - base
    models = np.linalg.solve(axes @ inner @ axes.T, axes @ inner @ offsets.T).T
    rest = offsets - models @ axes
    residuals = np.sqrt(np.maximum(np.einsum("mi,ij,mj->m", rest, inner, rest), 0))
    total, missed = (np.trace((v - v.mean(0)) @ inner @ (v - v.mean(0)).T) for v in (offsets, rest))
    return Plane(states, base, axes, models, residuals, 1 - missed / total if total else 1.)


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


def square_grids(planes, kind, size, names):
    """(xs [size], ys [size]) for each plane: squares of one side for all; random ones reach the network's norm far."""
    centres = [(plane.models.max(0) + plane.models.min(0)) / 2 for plane in planes]
    half = (.5 + MARGIN) * max((plane.models.max(0) - plane.models.min(0)).max() for plane in planes)
    if kind == "random":
        centres = [plane.models[0] for plane in planes]
        half = max(math.sqrt(gram(plane.states[-1:], names)[0, 0]) for plane in planes)
    return [[centre[k] + np.linspace(-half, half, size) for k in (0, 1)] for centre in centres]


#############################################
#               The surface                 #
#############################################


def coarse_to_fine(size):
    """Flat indices of a size x size grid, level by level: every 8th point of a side, every 4th, every 2nd, all."""
    seen, levels = np.zeros((size, size), bool), []
    for stride in (8, 4, 2, 1):
        wanted = np.zeros_like(seen)
        wanted[::stride, ::stride] = True
        levels.append(np.flatnonzero(wanted & ~seen))
        seen |= wanted
    return levels


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


def probe_points(plane):
    """Coefficients of what is measured beside the grid: the models, 9 inner points of each pair's line, circles.

    A circle has 8 directions in the plane and lies around the model itself, whether or not the plane holds it.
    """
    count = len(plane.models)
    unit = np.eye(len(plane.base))[:count]
    lines = [(1 - alpha) * unit[i] + alpha * unit[j] for i, j in itertools.combinations(range(count), 2)
             for alpha in np.linspace(0, 1, 11)[1:-1]]
    angles = np.arange(8) * math.pi / 4
    ring = np.stack([np.cos(angles), np.sin(angles)], 1) @ plane.axes
    circles = [unit[m] + radius * step for m in range(count) for radius in RADII for step in ring]
    return np.array([*unit, *lines, *circles])


def read_probes(losses, count):
    """(losses [count], barriers [count, count], rises [count, radii]) from the losses at probe_points."""
    models, rest = losses[:count], losses[count:]
    pairs = list(itertools.combinations(range(count), 2))
    barriers, alphas = np.zeros((count, count)), np.linspace(0, 1, 11)[1:-1]
    for (i, j), line in zip(pairs, rest[:9 * len(pairs)].reshape(-1, 9)):
        barriers[i, j] = barriers[j, i] = max((line - (1 - alphas) * models[i] - alphas * models[j]).max(), 0)
    circles = rest[9 * len(pairs):].reshape(count, len(RADII), 8)
    return models, barriers, circles.mean(2) - models[:, None]


def area_below(losses, xs, ys, level):
    """(area in squared parameter distance, fraction of the grid) of the cells whose loss is below `level`."""
    below = int((losses < level).sum())
    return below * float((xs[1] - xs[0]) * (ys[1] - ys[0])), below / losses.size


def all_coefficients(plane, xs, ys):
    """Coefficients [probes + n * n, M]: the probe points, then the grid, row by row along y."""
    points = np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2)
    return np.concatenate([probe_points(plane), plane.coefficients(points)])


def survey(path, planes, grids, scorers, permits, about, earlier=None):
    """Evaluate probes and grids of S planes, coarse to fine, into `path` (see pack), with pictures after each level.

    scorers[s](coefficients [K, M]) -> K rows (loss, accuracy, standard error of the loss); where permits[s](them) is
    False they stay NaN. `earlier` = (scores, done) of an interrupted survey; a stop loses half a minute. Of several
    ranks each takes an equal part of every batch of points.
    """
    size, (rank, count, *_) = len(grids[0][0]), ranks.together.get()
    about = about | {key: np.array([grid[k] for grid in grids]) for k, key in enumerate(("xs", "ys"))}
    coefficients = np.stack([all_coefficients(plane, *grid) for plane, grid in zip(planes, grids)])
    coefficients = ranks.first_says(coefficients).numpy()
    scores, done = earlier or (np.full((*coefficients.shape[:2], 3), np.nan), np.zeros(coefficients.shape[:2], bool))
    done |= ~np.stack([permit(points) for permit, points in zip(permits, coefficients)])
    probes, saved = coefficients.shape[1] - size ** 2, time.monotonic()
    with tqdm(total=done.size, initial=int(done.sum()), desc="surface", unit="point", disable=None, leave=False) as bar:
        for level in [np.arange(probes), *(probes + level for level in coarse_to_fine(size))]:
            if done[:, level].all():
                continue
            for s, score in enumerate(scorers):
                todo, batch = level[~done[s, level]], 4
                while len(todo):
                    part, todo, start = todo[:batch * count], todo[batch * count:], time.monotonic()
                    own, found = part[rank::count], np.zeros((len(part), 3))
                    if len(own):
                        found[rank::count] = score(coefficients[s, own])
                    scores[s, part] = ranks.sum_over_ranks_(torch.from_numpy(found))
                    done[s, part] = True
                    bar.update(len(part))
                    seconds = float(ranks.first_says(time.monotonic() - start))
                    batch = int(np.clip(10 * len(part) / count / max(seconds, 1e-3), 1, 64))
                    if time.monotonic() - saved > 20:
                        common.save(path, pack(scores, done, about, size))
                        saved = time.monotonic()
            common.save(path, pack(scores, done, about, size))
            if level[0] >= probes and not done.all() and count == 1:  # a coarse picture; the caller draws the last
                draw_surface(pack(scores, done, about, size), path.parent, path.stem)


def score_points(model, plane, mask, split, refresh, sparse, coefficients):
    """Scores [K] of points on `split`; `refresh`, a split, gives BatchNorm's statistics at each. `model` is scratch."""
    rows = common.evaluate_points(model, plane.states, coefficients.tolist(), [split], mask, refresh, sparse=sparse)
    return [row[0] for row in rows]


#############################################
#             Files and figures             #
#############################################


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
    surface = common.load(path)
    if str(surface.get("format")) != FORMAT:
        raise UserError(f"{path}: not a surface of this version of landscape.py ({FORMAT})")
    return surface


def finest(surface):
    """The stride of the finest grid level of which every point is done; None before the first."""
    losses = surface["losses"]
    grid = surface["done"][:, -losses[0].size:].reshape(losses.shape)
    return next((stride for stride in (1, 2, 4, 8) if grid[:, ::stride, ::stride].all()), None)


def print_surface(surface):
    """Per subnetwork: its models, the barriers between them, how sharp they lie; and the area of low loss."""
    count, stride = surface["models"].shape[1], finest(surface)
    results = [read_probes(probes[:, 0], count) for probes in surface["probes"]]
    level = 1.25 * max(models.max() for models, _, _ in results)
    for s, (losses, barriers, rises) in enumerate(results):
        print(f"\n{surface['labels'][s]}: the plane holds {surface['explained'][s]:.1%} of the models' variance")
        print("order               loss accuracy off plane    barrier to" + "".join(f" {m:>6}" for m in range(count))
              + "    rise at distance" + "".join(f"{radius:>8}" for radius in RADII))
        for m, (_, accuracy, error) in enumerate(surface["probes"][s, :count]):
            print(f"{m:>5} {losses[m]:>9.4f} ± {error:.4f} {accuracy:>8.2%} {surface['residuals'][s, m]:>9.3f}{'':13}",
                  *(f"{height:>6.3f}" for height in barriers[m]), " " * 18, *(f"{rise:>7.4f}" for rise in rises[m]))
        losses, xs, ys = (surface[key][s] for key in ("losses", "xs", "ys"))
        area, share = area_below(losses[::stride, ::stride], xs[::stride], ys[::stride], level)
        print(f"loss below {level:.3f} (1.25 x the highest of all models): area {area:.2f}, {share:.1%} of the picture")


def draw_surface(surface, out, name):
    """Fig. 5: <name>.png, contours of the loss, and <name>_surface.png; one logarithmic scale for all subnetworks."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    stride, settings = finest(surface), json.loads(str(surface["settings"]))
    if stride is None:
        raise UserError("no level of the grid is finished yet: give the command that began it again")
    losses = surface["losses"][:, ::stride, ::stride]
    lowest = max(np.nanmin(losses), 1e-6)
    cap = min(max(np.nanmax(losses), 1.1 * lowest), max(4 * math.log(settings["num_classes"]), 2 * lowest))
    colours = colormaps["viridis"].with_extremes(over="#fffde0")
    scale, levels, count = LogNorm(lowest, cap), np.geomspace(lowest, cap, 19), len(losses)
    label = f"{settings['on'].replace('real', 'training')} loss, log scale, capped at {cap:.3g}"
    ticks = np.geomspace(lowest, cap, 7)
    flat, solid = (Figure(figsize=(5 * count + 1.2, 5), layout="constrained") for _ in range(2))
    plans = flat.subplots(1, count, squeeze=False)[0]
    reliefs = solid.subplots(1, count, squeeze=False, subplot_kw={"projection": "3d"})[0]
    for s, (plan, relief) in enumerate(zip(plans, reliefs)):
        xs, ys, heights = surface["xs"][s, ::stride], surface["ys"][s, ::stride], np.clip(losses[s], lowest, cap)
        filled = plan.contourf(xs, ys, np.maximum(losses[s], lowest), levels, norm=scale, cmap=colours, extend="max")
        plan.contour(xs, ys, heights, levels[::3], colors="black", linewidths=.4)
        plan.set(xlabel="distance in parameter space", aspect="equal", title=surface["labels"][s], facecolor=".7")
        mark_models(plan, surface["models"][s], surface["residuals"][s], xs[-1] - xs[0])
        sheet = relief.plot_surface(*np.meshgrid(xs, ys), np.log10(heights), cmap="viridis", rcount=60,
                                    ccount=60, vmin=math.log10(lowest), vmax=math.log10(cap), linewidth=0)
        relief.set(zlim=np.log10([lowest, cap]), title=surface["labels"][s])
        relief.set_zticks(np.log10(ticks), [f"{tick:.3g}" for tick in ticks])
        relief.view_init(elev=38, azim=-60)
        relief.tick_params(labelsize=7)
    flat.colorbar(filled, ax=list(plans), shrink=.8, label=label, ticks=ticks, format="%.3g")
    bar = solid.colorbar(sheet, ax=list(reliefs), shrink=.6, pad=.04, label=label, ticks=np.log10(ticks))
    bar.ax.set_yticklabels([f"{tick:.3g}" for tick in ticks])
    common.save(out / f"{name}.png", flat)
    common.save(out / f"{name}_surface.png", solid)


def mark_models(axes, models, residuals, extent):
    """Models by their order: a full marker in the plane, a hollow one with its distance beside it."""
    for order, ((x, y), distance) in enumerate(zip(models, residuals)):
        face, text = ("white", "black") if distance < 1e-3 * extent else ("none", "white")
        for edge, width in (("white", 3), ("black", 1)):
            axes.plot(x, y, "o", markersize=13, markerfacecolor=face, markeredgecolor=edge, markeredgewidth=width)
        axes.annotate(f"{order}", (x, y), ha="center", va="center", fontsize=9, color=text, weight="bold")
        if face == "none":
            axes.annotate(f"{distance:.2g} off the plane", (x, y), xytext=(10, 8), textcoords="offset points",
                          fontsize=8, bbox=dict(boxstyle="round", facecolor="white", alpha=.85, linewidth=0))


#############################################
#                Command line               #
#############################################


def parse(argv=None):
    parser = common.Parser(__doc__)
    tickets.subnetwork_flags(parser)
    plane = parser.add_argument_group("the plane")
    plane.add_argument("--plane", choices=("three", "pca", "paper", "random"), default="three",
                       help="see above (three)")
    plane.add_argument("--orders", type=at_least(1), default=4, help="models, one for each data order (4)")
    plane.add_argument("--grid", type=at_least(9), default=100, help="points along a side (100)")
    plane.add_argument("--on", choices=("real", "test", "distilled"), default="real",
                       help="data of the loss: training, test or the distilled set of the first synthetic mask (real)")
    plane.add_argument("--eval-images", type=at_least(2), metavar="N", help="random N of them, always the same (all)")
    plane.add_argument("--bn", choices=("recompute", "lerp"), default="recompute",
                       help="BatchNorm statistics: at each point those of 1,000 training images, or interpolated, "
                            "points outside the convex hull of the models left blank (recompute)")
    plane.add_argument("--extrapolate", action="store_true",
                       help="--bn lerp beyond it; blank if a variance is negative")
    output = parser.add_argument_group("output")
    output.add_argument("--endpoints", type=common.folder, default=Path("runs/stability"),
                        help="trained models (runs/stability)")
    output.add_argument("--out", type=common.folder, default=Path("runs/landscape"),
                        help="folder of results (runs/landscape)")
    output.add_argument("--overwrite", action="store_true", help="replace another surface and other end points")
    output.add_argument("--basis", action="store_true", help="store the plane's two directions in the npz too")
    output.add_argument("--plot", type=Path, metavar="FILE", help="draw this landscape.npz again, without computing")
    return parser.parse_args(argv)


def distilled_split(subnetworks, train):
    """The distilled set that the first synthetic mask was found on, or the embedded one. Raises UserError."""
    configs = [subnetwork["config"] for subnetwork in subnetworks.values()]
    config = next((config for config in configs if config["data"] == "distilled"), configs[0])
    shape = splits.Dataset(config["channels"], config["image_size"], config["num_classes"], train.mean, train.std)
    ipc = config.get("ipc", 10)
    path = config.get("distilled") or splits.embedded_distilled(config["dataset"], ipc)
    return splits.load_distilled(path, shape, ipc, config.get("factor"), train.labels.device)


def settings_of(args, subnetworks):
    """All that the surface depends on. Raises UserError for fewer models than the plane needs."""
    if args.orders < MODELS_NEEDED[args.plane]:
        raise UserError(f"--orders {args.orders}: --plane {args.plane} needs {MODELS_NEEDED[args.plane]} models")
    flags = ("plane", "orders", "grid", "on", "eval_images", "bn", "extrapolate", "seed")
    configs = [subnetwork["config"] for subnetwork in subnetworks.values()]
    masks = [[tickets.fingerprint(subnetwork), config["seed"],
              *common.recipe_of(config, args.epochs or config["eval_epochs"])]
             for subnetwork, config in zip(subnetworks.values(), configs)]
    return {key: getattr(args, key) for key in flags} | {"num_classes": configs[0]["num_classes"], "masks": masks}


def earlier_scores(path, settings, overwrite):
    """(scores, done) of the surface in `path`, None to `overwrite` one of other settings. Raises UserError."""
    surface = read_surface(path)
    earlier = json.loads(str(surface["settings"]))
    different = next((key for key in settings if earlier.get(key) != settings[key]), None)
    if different and not overwrite:
        raise UserError(f"{path} is a surface of other {different}; --overwrite replaces it, or choose another --out")
    return None if different else unpack(surface)


def train_planes(subnetworks, train, names, args):
    """The plane of each subnetwork through its trained (or found) models."""
    planes = []
    for path, subnetwork in subnetworks.items():
        states = [tickets.endpoint(args.endpoints, path, subnetwork, train, order, args.epochs, args.seed,
                                   overwrite=args.overwrite)["state"] for order in range(args.orders)]
        planes.append(make_plane(args.plane, states, names, common.random_stream(args.seed or 0, "plane")))
    return planes


def show(path):
    """Draw and print a surface, finished or not; the pictures go beside its file."""
    draw_surface(read_surface(path), path.parent, path.stem)
    print_surface(read_surface(path))


def main():
    args = parse()
    if args.plot:
        return show(args.plot)
    subnetworks, train, test = tickets.load_subnetworks(args.mask, args)
    settings = settings_of(args, subnetworks)
    path = args.out / ("landscape.npz" if args.on == "real" else f"landscape_{args.on}.npz")
    earlier = earlier_scores(path, settings, args.overwrite) if path.exists() else None
    split = distilled_split(subnetworks, train) if args.on == "distilled" else {"real": train, "test": test}[args.on]
    model = common.build_network(next(iter(subnetworks.values()))["config"]).to(train.labels.device)
    names = [name for name, _ in model.named_parameters()]
    tickets.train_ahead(args.endpoints, subnetworks, train, args.orders, args.epochs, args.seed,
                        overwrite=args.overwrite)
    planes = train_planes(subnetworks, train, names, args)
    about = {key: np.array([getattr(plane, key) for plane in planes]) for key in ("models", "residuals", "explained")}
    about |= {"labels": [tickets.label(one) for one in subnetworks.values()], "settings": json.dumps(settings)}
    if args.basis:
        about["basis"] = np.stack([plane.axes @ vectors(plane.states, names).cpu().numpy() for plane in planes])
    has_batchnorm = any(name.endswith("running_var") for name in model.state_dict())
    refresh = splits.fixed_subset(train, 1000, "batchnorm") if has_batchnorm and args.bn == "recompute" else None
    split = splits.fixed_subset(split, args.eval_images, "evaluate")
    scorers = [partial(score_points, model, plane, subnetwork["masks"], split, refresh,
                       subnetwork["config"].get("sparse", "auto"))
               for plane, subnetwork in zip(planes, subnetworks.values())]
    permits = [partial(allowed, plane, args.bn, args.extrapolate) for plane in planes]
    survey(path, planes, square_grids(planes, args.plane, args.grid, names), scorers, permits, about, earlier)
    if ranks.together.get().rank:
        return
    show(path)
    print(f"written: {path} and pictures")


if __name__ == "__main__":
    common.run(main)
