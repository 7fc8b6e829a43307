"""Draw every table and picture of docs/study.md from the tables in docs/study/.

    python study/report.py

A table stands between <!-- table NAME --> and <!-- end -->, where this writes it; all other text is left as it is. An
effect is a difference between two cells of the same seed; its interval is that of Student's t over the seeds, 95%. An
interval that includes 0 leaves it unresolved.
"""
import argparse
import math
import re
import statistics
from pathlib import Path

import runs

# Student's t for 95%, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
NAMES = {"dense": "dense", "imp": "IMP", "synthetic": "synthetic", "subset": "real subset", "tiles": "tiles",
         "published": "synthetic, MTT's set",
         "random": "random masks", "untrained": "untrained", "started": "IMP from the synthetic mask",
         "rewound": "IMP, rewound to epoch 3", "synthetic1": "synthetic, 1 a class",
         "synthetic50": "synthetic, 50 a class",
         "published1": "MTT's set, 1 a class", "published50": "MTT's set, 50 a class"}
COLOURS = {"dense": "black", "imp": "#1f4e8c", "synthetic": "#e08214", "published": "#c51b7d", "subset": "#4d9221",
           "tiles": "#8c6d31", "untrained": "#17becf"}
RIGHT_WAY = {"masked": "masked", "unmasked": "masked", "weights": "masked", "refreshed": "refreshed",
             "interpolated": "refreshed"}
NETWORK_NAMES = {"base": "width 32, instance norm", "batch": "width 32, batch norm",
                 "width16": "width 16, instance norm", "width64": "width 64, instance norm"}

#############################################
#                Statistics                 #
#############################################


def interval(values):
    """(mean, half the width of its 95% interval) over seeds; NaN for one."""
    mean, n = statistics.fmean(values), len(values)
    return mean, T95[n - 1] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan


def cells(rows, keys=("family", "search", "round")):
    """{the values of `keys`: {seed: row}} in the table's order."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), {})[row["seed"]] = row
    return found


def values(cell, measure):
    return [float(row[measure]) for row in cell.values()]


def differences(cell, other, measure):
    """Of the seeds that both cells have."""
    return [float(cell[seed][measure]) - float(other[seed][measure]) for seed in cell if seed in other]


def shown(values, digits):
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def effect(values, digits):
    """A mean difference with its interval, and whether it is one."""
    if len(values) < 2:
        return "–"
    if not any(round(value, digits) for value in values):
        return "none"
    mean, half = interval(values)
    text = f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"
    return text if abs(mean) > half else f"{text}, unresolved"


def label(key):
    """A cell in words, without its search."""
    return NAMES.get(key[0], key[0])


#############################################
#                  Tables                   #
#############################################


def table(header, lines):
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (header, rule, *lines)) + "\n"


def endpoint_table(rows, measure, title, digits, references=("imp",)):
    """A line a cell: a measure, and its difference from the cells of `references` in the same round."""
    found = cells(rows)
    header = ["masks", "sparsity (%)", "images shown", "seeds", title]
    lines = []
    for key, cell in found.items():
        row = next(iter(cell.values()))
        line = [label(key), f"{float(row['sparsity']):.1f}", f"{int(row['images_shown']):,}", len(cell),
                shown(values(cell, measure), digits)]
        for reference in references:
            other = next((c for k, c in found.items() if k[0] == reference and k[2] in (key[2], "0")), {})
            line.append("" if cell is other else effect(differences(cell, other, measure), digits))
        lines.append(line)
    return table(header + [f"against {NAMES[reference]}" for reference in references], lines)


def accuracy_table(rows):
    return endpoint_table(rows, "test_accuracy", "test accuracy (%)", 1, ("imp", "random"))


def error_barrier_table(rows):
    return endpoint_table(rows, "test_error_barrier", "test error barrier (%)", 2, ("imp", "dense"))


def height_table(rows):
    return endpoint_table(rows, "train_loss_midpoint", "height of the training loss", 4, ("imp", "dense"))


def map_table(rows, axis):
    """Stability, then accuracy: the effect of the `axis` (search or training) on a family, and of the family there."""
    stability = [("test_error_barrier", "test error barrier (%)", 2),
                 ("train_loss_midpoint", "height of the training loss", 4)]
    accuracy = [("test_accuracy", "test accuracy (%)", 1)]
    return "\n".join(axis_table(rows, axis, measures) for measures in (stability, accuracy))


def axis_table(rows, axis, measures):
    """A line a cell: each measure, and its differences along the `axis` and from IMP at the same place on it."""
    found = cells(rows, ("family", axis, "round"))
    lines = []
    for key, cell in found.items():
        family, place, number = key
        row = next(iter(cell.values()))
        before, imp = found.get((family, "preset", number), {}), found.get(("imp", place, number), {})
        line = [label(key), place, f"{float(row['sparsity']):.1f}", f"{int(row['images_shown']):,}", len(cell)]
        for measure, _, digits in measures:
            line.append(shown(values(cell, measure), digits))
            line.append("" if place in ("preset", "none") else effect(differences(cell, before, measure), digits))
            line.append("" if not imp or family == "imp" else effect(differences(cell, imp, measure), digits))
        lines.append(line)
    header = ["masks", axis, "sparsity (%)", "images shown", "seeds"]
    for _, title, _ in measures:
        header += [title, f"against the preset {axis}", f"against IMP of the same {axis}"]
    return table(header, lines)


def search_table(rows):
    return map_table(rows, "search")


def training_table(rows):
    return map_table(rows, "training")


def networks_table(rows):
    """The map of the searches, a table a network."""
    parts = [f"{NETWORK_NAMES[network]}:\n\n{search_table(part)}" for network, part in by_network(rows).items()]
    return "\n".join(parts)


def by_network(rows):
    parts = {}
    for row in rows:
        parts.setdefault(row["network"], []).append(row)
    return parts


def ways_table(rows):
    """A line a family and way, with the difference from the right way on the same endpoints (weights: same seeds)."""
    found = cells(rows, ("family", "search", "way", "round"))
    lines = []
    for (family, search, way, number), cell in found.items():
        right = found[family, "preset" if way == "weights" else search, RIGHT_WAY[way], number]
        line = [NAMES[family], search, f"{float(next(iter(cell.values()))['sparsity']):.1f}", way, len(cell)]
        for measure, digits in (("train_loss_barrier", 4), ("test_loss_barrier", 4), ("test_error_barrier", 2)):
            line.append(shown(values(cell, measure), digits))
            line.append("" if cell is right else effect(differences(cell, right, measure), digits))
        lines.append(line)
    header = ["masks", "search", "sparsity (%)", "way", "seeds"]
    for title in ("training loss barrier", "validation loss barrier", "test error barrier (%)"):
        header += [title, "against the right way"]
    return table(header, lines)


def hessian_table(rows):
    """Curvature over surviving and over all weights; differences are those of the surviving ones and of the trace."""
    found = cells(rows, ("family", "search", "round", "scope"))
    lines = []
    for (family, search, number, scope), cell in found.items():
        if scope != "surviving":
            continue
        every, imp = found[family, search, number, "all"], found.get(("imp", search, number, scope), {})
        row = next(iter(cell.values()))
        line = [NAMES[family], f"{float(row['sparsity']):.1f}", len(cell), shown(values(every, "mean_abs"), 4)]
        for measure, digits in (("mean_abs", 4), ("trace", 0)):
            line.append(shown(values(cell, measure), digits))
            line.append("" if family in ("imp", "dense") else effect(differences(cell, imp, measure), digits))
        lines.append(line)
    header = ["masks", "sparsity (%)", "seeds", "mean &#124;h&#124;, all weights", "surviving", "against IMP"]
    return table([*header, "trace", "against IMP"], lines)


def rise_table(rows):
    return endpoint_table(rows, "rise_2", "rise of the training loss at distance 2", 3, ("imp", "dense"))


def start_table(rows):
    return endpoint_table(rows, "test_accuracy", "test accuracy (%)", 1, ("imp", "random"))


def overlap_table(rows):
    """A line a pair and round: what two masks share, and how far their layers' sparsities lie apart."""
    pair = "family", "search", "other_family", "other_search", "round"
    whole = cells([row for row in rows if row["layer"] == "all"], pair)
    lines = []
    for key, cell in whole.items():
        layers = [row for row in rows if tuple(row[name] for name in pair) == key and row["layer"] != "all"]
        apart = [max(100 * abs(float(row["sparsity_a"]) - float(row["sparsity_b"])) for row in layers
                     if row["seed"] == seed) for seed in cell]
        ratios = values(cell, "ratio")
        names = [f"{NAMES[family]}, {search}" for family, search in (key[:2], key[2:4])]
        sparsity = 100 * statistics.fmean(values(cell, "sparsity_a"))
        lines.append([*names, f"{sparsity:.1f}", len(cell), shown(ratios, 3), effect([r - 1 for r in ratios], 3),
                      f"{min(values(cell, 'z')):.1f}", shown(apart, 1)])
    return table(["masks", "and", "sparsity (%)", "seeds", "shared / expected if independent", "more than 1", "least z",
                  "layers' sparsities, largest gap (points)"], lines)


def compression_table(rows):
    parts = accuracy_table(rows), error_barrier_table(rows), height_table(rows)
    return "\n".join(parts)


TABLES = {"accuracy": ("accuracy", accuracy_table), "error barrier": ("stable", error_barrier_table),
          "height": ("stable", height_table), "search": ("search", search_table),
          "training": ("training", training_table), "both": ("both", search_table),
          "networks": ("networks", networks_table), "ways": ("ways", ways_table),
          "hessian": ("hessian", hessian_table), "rise": ("rise", rise_table), "start": ("start", start_table),
          "overlap": ("overlap", overlap_table), "compression": ("compression", compression_table)}


def filled(text, folder):
    """The page with its tables written anew; one whose data is missing says so."""
    def drawn(match):
        name, draw = TABLES[match[1]]
        path = folder / f"{name}.csv"
        body = draw(runs.read(path)) if path.exists() else "*Not run at this scale.*\n"
        return f"<!-- table {match[1]} -->\n{body}<!-- end -->"

    return re.sub(r"<!-- table (.+?) -->\n.*?<!-- end -->", drawn, text, flags=re.DOTALL)


#############################################
#                 Pictures                  #
#############################################


def draw_bars(axes, rows, measure, title, axis="search"):
    """A point a cell with its interval; a group of points for each family and place on the axis (search, training)."""
    found = cells(rows, ("family", axis, "round"))
    names = list(dict.fromkeys(key[:2] for key in found))
    rounds = sorted({int(key[2]) for key in found} - {0})
    for (family, where, number), cell in found.items():
        place = names.index((family, where))
        if number != "0":
            place += .24 * (rounds.index(int(number)) - (len(rounds) - 1) / 2)
        mean, half = interval(values(cell, measure))
        marker = "D" if number == "0" else "os^v"[rounds.index(int(number))]
        axes.errorbar(place, mean, half, fmt=marker, color=COLOURS.get(family, "grey"), capsize=3, markersize=6)
    ticks = [NAMES[family] if where in ("preset", "none") else f"{NAMES[family]}, {where} {axis}"
             for family, where in names]
    axes.set_xticks(range(len(names)), ticks, rotation=35, ha="right", fontsize=8)
    axes.set_ylabel(title)
    axes.grid(alpha=.3, axis="y")
    if measure == "test_error_barrier":
        axes.axhline(2, color="grey", lw=.8, ls="--", label="stable below")
    for place, number in enumerate(rounds):
        sparsity = next(float(row["sparsity"]) for row in rows if int(row["round"]) == number)
        axes.plot([], [], "os^v"[place], color="grey", label=f"{sparsity:.0f}% sparse")
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(.5, 1), ncols=3)  # off the intervals


def draw(panels, path):
    """Panels side by side, each of (rows, measure, title of its axis)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    for axes, (rows, measure, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        draw_bars(axes, rows, measure, title, "training" if "training" in rows[0] else "search")
        axes.set_xlabel(NETWORK_NAMES.get(rows[0].get("network"), ""))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


BARRIER, ACCURACY = ("test_error_barrier", "test error barrier (%)"), ("test_accuracy", "test accuracy (%)")
PICTURES = {"accuracy": [ACCURACY, BARRIER], "search": [BARRIER, ACCURACY],
            "training": [BARRIER, ACCURACY], "both": [BARRIER, ACCURACY], "compression": [BARRIER, ACCURACY],
            "networks": [BARRIER], "start": [ACCURACY],
            "rise": [("rise_2", "rise of the training loss at distance 2")],
            "hessian": [("mean_abs", "mean |h| over surviving weights"), ("trace", "trace of the Hessian")]}


def draw_pictures(folder, out):
    """A picture of each table that is there."""
    for name, measures in PICTURES.items():
        path = folder / f"{name}.csv"
        if path.exists():
            rows = [row for row in runs.read(path) if row.get("scope", "surviving") == "surviving"]
            parts = by_network(rows).values() if name == "networks" else [rows]
            draw([(part, *measure) for part in parts for measure in measures], out / f"study_{name}.png")


def main():
    docs = runs.ROOT / "docs"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, default=docs / "study", help="folder of the tables (docs/study)")
    parser.add_argument("--page", type=Path, default=docs / "study.md", help="(docs/study.md)")
    parser.add_argument("--figures", type=Path, default=docs / "figures", help="folder of pictures (docs/figures)")
    args = parser.parse_args()
    args.page.write_text(filled(args.page.read_text(), args.tables))
    draw_pictures(args.tables, args.figures)


if __name__ == "__main__":
    main()
