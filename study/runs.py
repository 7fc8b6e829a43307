"""What the studies share: scales, families of masks, calls of the scripts, tables.

A study calls prune.py, stability.py, hessian.py, landscape.py and distill.py as a user would. Each of them goes on
where it stopped, and a command that has finished is not given again (<work>/finished.txt), so a study goes on as well.
All studies of one scale share the folder <work>: a mask or an endpoint that two of them need is made once.

    family   what the search trains on: FAMILIES, or synthetic<ipc>; dense is no search at all
    search   how hot and how long a round of the search trains: SEARCHES
    cell     a family and a search, and the folder of its masks: <work>/masks/<family>-<search>/seed<S>/r<round>.pt

Every endpoint of a scale is trained alike, whatever the search was, but for training.py, which varies just that.
"""
import argparse
import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = {
    "imp": "--data real",
    "synthetic": "--data distilled",
    "published": "--data distilled",  # the set that --published names
    "subset": "--data subset",  # control: as few real images, drawn at random
    "tiles": "--data distilled",  # control: the real images, chosen and made small, that the distilled set starts from
    "random": "--data random",  # control: random masks
    "untrained": "--data distilled --lr 0 --epochs 1",  # control: the smallest weights at initialisation go
}
SEARCHES = {  # flags that differ from the scale's, and times as many epochs
    "preset": ("", 1), "hot": ("--lr 0.1", 1), "long": ("", 5), "short": ("", .2),
    "weights": ("--rewind-what weights", 1)}  # of ways.py
TRAININGS = {"preset": "", "hot": "--lr .1", "long": "--epochs 24"}  # of the endpoints: what differs from the scale's
NETWORKS = {"base": "", "batch": "--norm batch", "width16": "--width 16", "width64": "--width 64"}  # likewise


class Scale(NamedTuple):
    seeds: tuple
    rounds: tuple  # whose masks are measured
    high: tuple  # the same at high sparsity, for start.py
    searches: tuple  # for search.py
    ipcs: tuple  # for compression.py
    networks: tuple  # for networks.py
    prune: str  # flags of every search
    endpoints: str  # flags of every training on real data
    line: str  # flags of stability.py's lines,
    hessian: str
    landscape: str
    distil: str = None  # flags of distill.py; None: the sets are embedded


SCALES = {
    "quick": Scale((0, 1), (1, 2), (3, 4), ("preset", "hot"), (2, 10), ("batch",),
                   "--preset quick --dataset digits --width 8 --train-images 400 --eval-epochs 3 --epochs 2",
                   "--epochs 3 --lr .05", "--points 3 --eval-images 300", "--batch 8 --batches 2",
                   "--plane random --orders 1 --grid 9 --eval-images 100", "--outer 2 --repeats 0"),
    "cpu": Scale((0, 1, 2, 3), (4, 9), (14,), ("preset", "hot", "long"), (1, 10, 50), ("base", "batch", "width16"),
                 "--preset quick", "--epochs 8 --lr .02", "--points 5", "--batch 32 --batches 4",
                 "--plane random --orders 1 --grid 9 --eval-images 1000"),
    "paper": Scale((0, 1, 2, 3), (4, 9), (14, 20, 25), ("preset", "hot", "short"), (1, 10, 50),
                   ("base", "batch", "width64"),
                   "--preset paper --model convnet3", "--epochs 300 --lr .01", "--points 11", "--batch 64 --batches 4",
                   "--plane three --orders 4 --grid 100", "--method idc --repeats 0"),
}


class Study(NamedTuple):
    scale: Scale
    data_dir: str
    published: str  # path of distilled sets with {ipc}, or None
    work: Path
    out: Path


def study(doc):
    """The Study that the command line describes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--scale", choices=SCALES, default="quick", help="quick: minutes, offline, tells nothing; cpu: docs/study.md; "
                                                          "paper: the paper's settings, for a GPU (quick)")
    flag("--data-dir", default="data", help="as in prune.py (data)")
    flag("--published", metavar="PATH", help="distilled sets of others, {ipc} for the images a class: one family more")
    flag("--rounds", type=int, nargs="+", help="pruning rounds whose masks are measured (the scale's)")
    flag("--searches", choices=SEARCHES, nargs="+", help="of search.py (the scale's)")
    flag("--work", type=Path, help="folder of masks and endpoints (runs/study/<scale>)")
    flag("--out", type=Path, help="folder of the tables (cpu: docs/study, else in --work)")
    args = parser.parse_args()
    scale = SCALES[args.scale]
    scale = scale._replace(rounds=tuple(args.rounds or scale.rounds), searches=tuple(args.searches or scale.searches))
    work = args.work or Path("runs/study") / args.scale
    out = args.out or (ROOT / "docs" / "study" if args.scale == "cpu" else work / "tables")
    return Study(scale, args.data_dir, args.published, work, out)


#############################################
#            Calls of the scripts           #
#############################################


def call(study, script, *flags):
    """Run a script with these flags, unless it has finished with them before. Ends the study when it fails."""
    flags = [str(flag) for flag in flags]
    command, finished = shlex.join(["python", script, *flags]), study.work / "finished.txt"
    if finished.exists() and command in finished.read_text().splitlines():
        return
    print(command, flush=True)
    done = subprocess.run([sys.executable, ROOT / script, *flags])
    if done.returncode:
        sys.exit(f"{script} ended with exit code {done.returncode}; the same study goes on from here")
    finished.parent.mkdir(parents=True, exist_ok=True)
    with open(finished, "a") as file:
        file.write(command + "\n")


def folder(study, family, search="preset"):
    return study.work / "masks" / f"{family}-{search}"


def find_masks(study, family, search="preset", last=None):
    """The masks of a cell up to the round `last`, for all seeds of the scale."""
    out, (different, times) = folder(study, family, search), SEARCHES[search]
    last = max(last or 0, *study.scale.rounds, *there(out, study.scale.seeds[0]))
    flags = [*study.scale.prune.split(), *data_flags(study, family), *different.split()]
    if times != 1:
        find_masks(study, family, "preset", last)
        preset = json.loads((folder(study, family) / f"seed{study.scale.seeds[0]}" / "config.json").read_text())
        flags += ["--epochs", round(times * preset["epochs"])]
    call(study, "prune.py", *flags, "--rounds", last, "--seeds", *study.scale.seeds,
         "--data-dir", study.data_dir, "--out", out)


def there(out, seed):
    """Numbers of the rounds of an earlier, perhaps longer search: prune.py's table would forget them."""
    return [int(path.stem[1:]) for path in (out / f"seed{seed}").glob("r*.pt") if path.stem[1:].isdigit()]


def families(study, *names):
    """These families, those of published sets only where there is one."""
    return [name for name in names if study.published or not name.startswith("published")]


def synthetic(study):
    """The family of the published set, or where there is none of the embedded one."""
    return "published" if study.published else "synthetic"


def data_flags(study, family):
    """What the search of a family trains on."""
    kind, ipc = re.fullmatch(r"([a-z]+)(\d*)", family).groups()
    flags = FAMILIES[kind].split()
    if "distilled" not in flags:
        return flags
    ipc = ipc or 10
    path = distilled_set(study, kind, ipc)
    flags += ["--ipc", ipc]
    return [*flags, "--distilled", path] if path else flags


def distilled_set(study, kind, ipc):
    """The file of a family's distilled set, made where none is at hand; None: the embedded one."""
    if kind == "published":
        return study.published.format(ipc=ipc)
    name, how = "set", study.scale.distil
    if kind == "tiles":
        name, how = "tiles", "--method select --repeats 0"
    if how is None:
        return None
    made = study.work / "distilled" / f"{name}{ipc}"
    dataset = "digits" if "digits" in study.scale.prune else "cifar10"
    call(study, "distill.py", "--dataset", dataset, "--ipc", ipc, *how.split(), "--data-dir", study.data_dir,
         "--out", made)
    return made / "data.pt"


def tickets(study, cells, rounds=None):
    """The mask files of [(family, search)] in these rounds, all seeds; the dense network is a search's round 0."""
    files = []
    for family, search in cells:
        numbers = [0] if family == "dense" else rounds or study.scale.rounds
        where = folder(study, "imp" if family == "dense" else family, search)
        files += [where / f"seed{seed}" / f"r{number}.pt" for number in numbers for seed in study.scale.seeds]
    return files


def with_network(study, network):
    """The study of another network, in a folder of its own."""
    if network == "base":
        return study
    scale = study.scale._replace(prune=f"{study.scale.prune} {NETWORKS[network]}", rounds=study.scale.rounds[:1])
    return study._replace(scale=scale, work=study.work / network)


def endpoint_flags(study, training="preset"):
    return [*study.scale.endpoints.split(), *TRAININGS[training].split(), "--data-dir", study.data_dir]


def lines(study, cells, rounds=None, training="preset"):
    """Rows, one a seed, of the endpoints of these cells: accuracy, and the barriers between two data orders.

    A cell is a call of its own: of two equal tickets in one call, stability.py keeps one.
    """
    out = study.work / ("endpoints" if training == "preset" else f"endpoints-{training}")
    wanted = []
    for cell in cells:
        masks = tickets(study, [cell], rounds)
        flags = [*endpoint_flags(study, training), *study.scale.line.split()]
        call(study, "stability.py", "--mask", *masks, *flags, "--out", out)
        wanted += map(str, masks)
    row_of = {row["mask"]: row for row in read(out / "stability.csv")}
    return [line_row(row_of[mask]) for mask in wanted]


def line_row(row):
    """What the tables hold of a row of stability.csv."""
    return about(row) | {"test_accuracy": percent(row["test_accuracy"]),
                         "test_error_barrier": percent(row["barrier_test_error"]),
                         "train_loss_barrier": number(row["barrier_train_loss"]),
                         "train_loss_midpoint": number(row["midpoint_barrier_train_loss"]),
                         "test_loss_barrier": number(row["barrier_test_loss"])}


#############################################
#                   Tables                  #
#############################################


def about(row):
    """family, search, seed, round, sparsity and images shown of a mask, from a script's row about it."""
    path = Path(row["mask"])
    family, search = path.parts[-3].rsplit("-", 1)
    number = int(path.stem[1:])
    shown = next(r["training_points"] for r in read(path.parent / "results.csv") if int(r["round"]) == number)
    if number == 0:
        family, search, shown = "dense", "none", 0
    return {"family": family, "search": search, "seed": int(path.parts[-2].removeprefix("seed")), "round": number,
            "sparsity": percent(row["sparsity"]), "images_shown": int(shown)}


def number(text):
    return float(f"{float(text):.6g}")


def percent(text):
    return number(100 * float(text))


def read(path):
    """The rows of a table; its values are text."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write(study, name, rows):
    """Save rows as <out>/<name>.csv."""
    study.out.mkdir(parents=True, exist_ok=True)
    with open(study.out / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"written: {study.out / name}.csv", flush=True)
