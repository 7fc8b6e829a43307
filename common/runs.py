"""The folder of a run of prune.py: which run it is, whether a command may go on in it, and its table results.csv."""
from pathlib import Path

from . import files
from .errors import UserError
from .tickets import changed_setting, family_names, round_files

COLUMNS = ("round", "sparsity", "remaining", "training_points", "train_loss", "train_accuracy",
           "test_loss", "test_accuracy", "seconds",  # since the last stop within the round
           "sparsity_of_all")  # parameters, biases and norms too

#############################################
#                 The folder                #
#############################################


def prepare_folder(out, config, overwrite):
    """Make `out` ready: empty, or holding an earlier part of this very run. Raises UserError naming the difference."""
    other = other_run(out, config)
    rounds = round_files(out)
    if other and not overwrite and len(rounds) > 1:  # a first try that failed leaves the dense network at most
        raise UserError(f"{out} holds another run ({other}); choose another --out, or --overwrite")
    if other:
        for name in ("training_r*.pt", "trained_r*.pt", "results.csv", "curves.csv", "prune.png"):
            rounds += out.glob(name)
        for old in rounds:
            old.unlink()
    files.save(out / "config.json", config)


def other_run(out, config):
    """How the run in `out` differs from that of `config`; "" when it does not, or there is none."""
    path = out / "config.json"
    if not path.exists():
        return "without a config.json" if round_files(out) else ""
    earlier = files.read_settings(path)
    if "rate" not in earlier:
        raise UserError(f"{path} is of no run of prune.py; choose another --out")
    key = changed_setting(earlier, config)
    return f"{key} {earlier.get(key)} -> {config.get(key)}" if key else ""


def run_folders(folder):
    """The folders with results.csv of one run: the seeds' below it, or itself. Raises UserError."""
    folder = Path(folder)
    tables = [*folder.glob("results.csv"), *sorted(folder.glob("seed*/results.csv"))]
    if not tables:
        raise UserError(f"{folder}: no results.csv of prune.py in it, nor in seed folders below")
    return [table.parent for table in tables]


def config_of_run(folder):
    """The config of a run; of its first seed. Raises UserError when its seeds differ in more than the seed."""
    configs = [files.read_settings(seed / "config.json") for seed in run_folders(folder)]
    different = sorted(set(family_names(configs)))
    if len(different) > 1:
        raise UserError(f"{folder} holds different runs: {' and '.join(different)}; only seeds are averaged")
    return configs[0]


#############################################
#                 The table                 #
#############################################


def row_of(ticket, seconds, parameters):
    """The row of results.csv of a ticket of so many parameters; what is not known of it is empty."""
    remaining = sum(int(kept.sum()) for kept in ticket["masks"].values())
    gone = sum(int((~kept).sum()) for kept in ticket["masks"].values())
    known = ticket["results"] | {"round": ticket["round"], "sparsity": ticket["sparsity"], "remaining": remaining,
                                 "seconds": round(seconds, 2), "sparsity_of_all": gone / parameters}
    return {column: known.get(column, "") for column in COLUMNS}


def read_seconds(out):
    """{round: seconds} of an earlier run in `out`. Only results.csv holds times: tickets are reproducible."""
    rows = read_results(out) if (out / "results.csv").exists() else []
    return {int(row["round"]): row["seconds"] for row in rows if "seconds" in row}


def read_results(folder):
    """The rows of a run's results.csv. Raises UserError."""
    return files.read_csv(folder / "results.csv", ("round", "sparsity", "training_points"))


def by_round(run):
    """The rows of all seeds of a run (a list of tables), round by round of the first seed."""
    rows = [row for table in run for row in table]
    numbers = sorted({row["round"] for row in run[0]})
    return [[row for row in rows if row["round"] == number] for number in numbers]


def print_table(rows):
    line = "{:>5} {:>8} {:>8} {:>10} {:>12} {:>10} {:>9} {:>8}"
    styles = {"round": "d", "sparsity": ".2%", "sparsity_of_all": ".2%", "remaining": ",d", "training_points": ",d",
              "train_loss": ".3f", "train_accuracy": ".2%", "test_accuracy": ".2%"}
    print(line.format("round", "sparsity", "of all", "remaining", "images seen", "train loss", "train acc", "test acc"))
    for row in rows:
        cells = ["" if row[column] == "" else format(row[column], style) for column, style in styles.items()]
        print(line.format(*cells))
