"""The studies from end to end at their smallest scale, offline; the statistics of the report against sums by hand."""
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "study"))

import report  # noqa: E402
import runs  # noqa: E402
import ways  # noqa: E402
from common.training import Recipe  # noqa: E402

TABLES = {"accuracy": ["accuracy"], "stable": ["stable"], "search": ["search"], "training": ["training"],
          "both": ["both"], "networks": ["networks"], "flatness": ["hessian", "rise"], "start": ["start"],
          "overlap": ["overlap"], "compression": ["compression"], "ways": ["ways"]}
KEYS = "family", "search", "training", "network", "way", "other_family", "other_search", "round", "scope", "layer"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The studies share one folder: what two of them need is made once."""
    return tmp_path_factory.mktemp("study")


def run(study, work):
    command = [sys.executable, str(ROOT / "study" / f"{study}.py"), "--scale", "quick", "--work", str(work)]
    return subprocess.run(command, capture_output=True, text=True, cwd=work, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("study", TABLES)
def test_a_study_measures_all_its_cells_and_goes_on_without_doing_anything_again(work, study):
    done = run(study, work)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    tables = {name: (work / "tables" / f"{name}.csv").read_bytes() for name in TABLES[study]}
    for name in tables:
        rows = runs.read(work / "tables" / f"{name}.csv")
        keys = [key for key in rows[0] if key in KEYS]
        assert {tuple(cell) for cell in report.cells(rows, keys).values()} == {("0", "1")}
    assert "python prune.py" not in run(study, work).stdout
    assert tables == {name: (work / "tables" / f"{name}.csv").read_bytes() for name in TABLES[study]}


def test_every_claim_has_its_study():
    assert {path.stem for path in (ROOT / "study").glob("*.py")} == {"runs", "report", *TABLES}


def test_weight_decay_alone_is_torchs():
    weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    recipe = Recipe(6, .1)
    optimizer = torch.optim.SGD([weight], recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    for epoch in range(6):
        optimizer.param_groups[0]["lr"] = recipe.learning_rate(epoch)
        for _ in range(7):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
    assert ways.decayed(recipe, 7) == pytest.approx(weight.item(), abs=1e-12)


def test_intervals_are_students():
    mean, half = report.interval([1., 2., 3., 6.])  # standard deviation sqrt(14/3), t of 3 degrees of freedom
    assert mean == 3 and half == pytest.approx(3.182 * (14 / 3 / 4) ** .5)


def test_an_effect_is_paired_by_seed_and_unresolved_when_its_interval_holds_0():
    one = {"0": {"x": "5"}, "1": {"x": "9"}, "2": {"x": "1"}}
    other = {"0": {"x": "4"}, "1": {"x": "7"}, "3": {"x": "100"}}
    assert report.differences(one, other, "x") == [1, 2]
    assert report.effect([1., 1.1, .9, 1.], 1) == "+1.0 [+0.9, +1.1]"
    assert report.effect([1., -1.1, .9, 1.], 1).endswith("unresolved")
    assert report.effect([0., 0., .04, 0.], 1) == "none"


def test_the_page_is_drawn_from_the_committed_tables():
    page = (ROOT / "docs" / "study.md").read_text()
    assert report.filled(page, ROOT / "docs" / "study") == page
    rows = runs.read(ROOT / "docs" / "study" / "search.csv")
    assert min(len(cell) for cell in report.cells(rows).values()) >= 4
