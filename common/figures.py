"""Figures of runs of prune.py: accuracy and images seen against sparsity (Fig. 2), two runs' masks (Sec. 6)."""
import math

from . import files
from .evaluation import mean_and_std
from .runs import by_round, config_of_run, read_results, run_folders
from .tickets import family_names


def draw_runs(folders, path):
    """Fig. 2: accuracy (mean and standard deviation over seeds) and images seen against sparsity.

    Returns whether there was anything to draw: random masks that were not trained have neither.
    """
    runs = [[read_results(seed) for seed in run_folders(folder)] for folder in folders]
    rows = [row for run in runs for table in run for row in table]
    panels = panels_of(rows)
    if not panels:
        return False
    figure, every_axes = figure_of(len(panels), 5, 4.2 + .2 * math.ceil(len(runs) / 3), margin=1)
    styles = [style_of(i, label) for i, label in enumerate(labels_of(folders, runs))]
    for axes, (draw, measure, title) in zip(every_axes, panels):
        for run, style in zip(runs, styles):
            draw(axes, by_round(run), measure, style)
        axes.set_ylabel(title)
        remaining_axis(axes, min(1 - row["sparsity"] for row in rows))
        axes.grid(alpha=.3)
    figure.legend(handles=legend_of(styles), fontsize=8, loc="outside lower center", ncols=min(3, len(runs)))
    files.save(path, figure)
    return True


def panels_of(rows):
    """[(function that draws a panel, column, its title)] of what results hold."""
    panels = []
    if any("test_accuracy" in row for row in rows):
        panels.append((draw_accuracy, "test_accuracy", "test accuracy after training on real data (%)"))
    elif any("train_accuracy" in row for row in rows):
        panels.append((draw_accuracy, "train_accuracy", "accuracy on the pruning data (%)"))
    if any(row["training_points"] for row in rows):
        panels.append((draw_images_seen, "training_points", "training points seen to reach the mask"))
    return panels


def labels_of(folders, runs):
    """The family of every run, and of how many seeds it is."""
    names = family_names([config_of_run(folder) for folder in folders])
    return [f"{name} ({len(run)} seeds)" if len(run) > 1 else name for name, run in zip(names, runs)]


def style_of(i, label):
    """Colour, line and marker of the family number `i`: 20 colours, ten of them lighter, and 40 combinations."""
    from matplotlib import colormaps

    colour = colormaps["tab20"](2 * (i % 10) + i // 10 % 2)
    return dict(color=colour, ls=("-", "--", "-.", ":")[i % 4], marker="os^DvPX*"[i % 8], label=label)


def figure_of(count, width, height, margin=0, **kind):
    """(figure, axes of its `count` panels): three in a row, each of width x height inches, and a margin beside them."""
    from matplotlib.figure import Figure

    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(margin + width * columns, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **kind).flatten()
    for axes in grid[count:]:
        axes.remove()
    return figure, list(grid[:count])


def legend_of(styles):
    """A line for every family, also for those that a panel lacks."""
    from matplotlib.lines import Line2D

    return [Line2D([], [], **style) for style in styles]


def draw_accuracy(axes, rounds, measure, style):
    """Mean and standard deviation over seeds, in the rounds in which all of them have it."""
    complete = [rows for rows in rounds if all(measure in row for row in rows)]
    if complete:
        remaining = [1 - rows[0]["sparsity"] for rows in complete]
        scores = [mean_and_std([100 * row[measure] for row in rows]) for rows in complete]
        means, deviations = zip(*scores)
        axes.errorbar(remaining, means, deviations, capsize=3, **style)


def draw_images_seen(axes, rounds, measure, style):
    """The column of the first seed, on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullLocator

    firsts = [rows[0] for rows in rounds if rows[0][measure]]
    if firsts:
        axes.plot([1 - row["sparsity"] for row in firsts], [row[measure] for row in firsts], **style)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:,.0f}")


def remaining_axis(axes, lowest):
    """A logarithmic axis of the fraction of weights remaining, dense at the left, labelled as the field does."""
    ticks = [.8 ** n for n in range(1 + round(math.log(lowest, .8)))]
    ticks = ticks[::math.ceil(len(ticks) / 11)]
    axes.set_xscale("log")
    axes.set_xlim(1.08, lowest * .92)
    axes.minorticks_off()
    axes.set_xticks(ticks, [f"{100 * t:.3g}" for t in ticks])
    axes.set_xlabel("weights remaining (%)")


def draw_comparison(rows, last, folders, path):
    """Left: sparsity of each layer in the last round, both runs. Right: overlap in each round, a line a layer."""
    from matplotlib import colormaps

    figure, (left, right) = figure_of(2, 6, 4.6)
    layers = [row["layer"] for row in last]
    names = [layer.removesuffix(".weight") for layer in layers]
    for side, column, folder, hatch in ((-.2, "sparsity_a", folders[0], ""), (.2, "sparsity_b", folders[1], "//")):
        places = [position + side for position in range(len(layers))]
        left.bar(places, [100 * row[column] for row in last], .4, label=str(folder), hatch=hatch, edgecolor="white")
    turned = dict(rotation=45, ha="right") if len(layers) < 8 else dict(rotation=90)
    left.set_xticks(range(len(layers)), names, fontsize=8, **turned)
    left.set_ylabel(f"sparsity in round {last[0]['round']} (%)")
    left.legend(fontsize=8, loc="lower center", bbox_to_anchor=(.5, 1), ncols=2)
    remaining = {row["round"]: 1 - row["sparsity_a"] for row in rows if row["layer"] == "all"}
    for i, (layer, name) in enumerate(zip(layers, names)):
        ratios = [row["ratio"] for row in rows if row["layer"] == layer]
        style = dict(color=colormaps["viridis"](i / len(layers)), ls=("-", "--", "-.", ":")[i % 4], lw=1)
        if layer == "all":
            style = dict(color="black", marker="o", lw=2)
        right.plot(remaining.values(), ratios, label=name, **style)
    right.axhline(1, color="grey", lw=.8)
    remaining_axis(right, min(remaining.values()))
    right.set_ylabel("shared survivors / expected if independent")
    size = min(8, 160 / len(layers))  # from the first layer, dark, to the last, light; beside the axes
    right.legend(fontsize=size, loc="center left", bbox_to_anchor=(1, .5), ncols=1 + len(layers) // 32)
    files.save(path, figure)
