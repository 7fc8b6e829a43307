"""What is seen of a training: its rows in curves.csv, TensorBoard's events, plain lines where no terminal is."""
import io
import math
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from common import bars, curves
from common.data import load_real
from common.errors import UserError
from common.networks import build_network
from common.streams import random_stream
from common.training import Recipe, train, train_saved
from conftest import ROOT

VALUES = dict(loss=1., accuracy=.5, lr=.1, images_per_second=9.)


def add_epochs(path, what, first, last):
    with curves.Curve(path, what, first - 1) as curve:
        for epoch in range(first, last + 1):
            curve.add(epoch, step=10 * epoch, **VALUES)


def epochs(path, what):
    return [int(row["epoch"]) for row in curves.read(path) if row["what"] == what]


def test_a_row_an_epoch_with_the_numbers_of_the_training(tmp_path):
    config = {"dataset": "digits", "train_images": 200, "model": "convnet3", "width": 4}
    split, _ = load_real(config, tmp_path)
    recipe = Recipe(3, lr=.02)
    train_saved(tmp_path / "r1.pt", {}, "round 1", build_network(config), split, recipe, random_stream(0))
    rows = curves.read(tmp_path / "curves.csv")
    assert list(rows[0]) == ["what", "step", "epoch", "loss", "accuracy", "lr", "images_per_second"]
    assert [row["what"] for row in rows] == 3 * ["round 1"] and [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [int(row["step"]) for row in rows] == [4, 8, 12]  # 200 images in batches of 64
    assert [float(row["lr"]) for row in rows] == pytest.approx([.02, .02, .02 * .2 ** 2])
    for row in rows:
        trained = train(build_network(config), split, recipe, random_stream(0), until=int(row["epoch"]))
        assert float(row["loss"]) == trained.loss and float(row["accuracy"]) == trained.accuracy
        assert 0 < float(row["images_per_second"]) < math.inf


def test_a_training_gone_on_with_writes_no_epoch_twice_and_leaves_the_others(tmp_path):
    path = tmp_path / "curves.csv"
    add_epochs(path, "round 1", 1, 2)
    add_epochs(path, "round 2", 1, 5)
    with open(path, "a") as file:
        file.write("round 2,60,6,1.0,0.")  # killed while it wrote
    add_epochs(path, "round 2", 4, 6)  # its last save was after epoch 3
    assert epochs(path, "round 1") == [1, 2] and epochs(path, "round 2") == [1, 2, 3, 4, 5, 6]


def test_trainings_side_by_side_write_to_one_table(tmp_path):
    path, names = tmp_path / "curves.csv", ["r8_order0", "a, b", "r8_order2"]

    def train_in_pieces(what):
        for k in range(20):
            add_epochs(path, what, 5 * k + 1, 5 * k + 5)

    with ThreadPoolExecutor() as pool:  # the lock is the one that processes take
        list(pool.map(train_in_pieces, names))
    for what in names:
        assert epochs(path, what) == list(range(1, 101))


def test_a_table_of_others_is_not_touched(tmp_path):
    (tmp_path / "curves.csv").write_text("x,y\n1,2\n")
    with pytest.raises(UserError, match="not a table of curves"):
        add_epochs(tmp_path / "curves.csv", "round 1", 1, 1)
    assert (tmp_path / "curves.csv").read_text() == "x,y\n1,2\n"


@pytest.fixture
def tensorboard():
    yield pytest.importorskip("torch.utils.tensorboard")
    curves.choose_log(None)


def test_tensorboard_gets_the_same_numbers(tensorboard, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves.choose_log("tensorboard")
    add_epochs(tmp_path / "curves.csv", "round 1", 1, 5)
    add_epochs(tmp_path / "curves.csv", "round 1", 4, 6)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "round_1")).Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(VALUES)
    for name, value in VALUES.items():
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [1, 2, 3, 4, 5, 6]
        assert all(scalar.value == pytest.approx(value) for scalar in scalars)


def test_tensorboard_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        curves.choose_log("tensorboard")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_only_where_there_is_no_terminal(monkeypatch):
    for stdout, lines in (io.StringIO(), 1), (Terminal(), 0):
        monkeypatch.setattr(sys, "stdout", stdout)
        with bars.Bar("round 1", 5, unit="epoch") as bar:
            bar.update(loss="2.000")
            bar.update(2, loss="1.500")
            bar.say()
        assert stdout.getvalue().count("\n") == lines
        assert not lines or re.fullmatch(r"round 1: epoch 3 of 5, loss 1.500, \d+ s\n", stdout.getvalue())


def test_a_line_a_minute_however_long_an_epoch_is(monkeypatch, tmp_path, capsys):
    now = 0.

    def clock():
        nonlocal now
        now += 1
        return now

    monkeypatch.setattr(bars.time, "monotonic", clock)  # every look at it is a second later
    config = {"dataset": "digits", "model": "convnet3", "width": 4}
    split, _ = load_real(config, tmp_path)
    capsys.readouterr()
    train_saved(tmp_path / "r1.pt", {}, "round 1", build_network(config), split, Recipe(1, batch_size=4),
                random_stream(0))
    said = [int(re.search(r"(\d+) s$", line)[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(said) > 3 and max(b - a for a, b in zip([0, *said], said)) <= 65


def test_lines_are_out_before_the_end(tmp_path):
    command = [sys.executable, ROOT / "prune.py", "--dataset", "digits", "--data", "real", "--width", "4",
               "--epochs", "2", "--train-images", "200", "--rounds", "50"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("round 1 "):
                assert process.poll() is None
                break
        else:
            pytest.fail("no line of round 1")
        process.kill()


#############################################
#        What goes wrong while it runs      #
#############################################


def test_a_line_that_another_process_left_unfinished_costs_no_row(tmp_path):
    path = tmp_path / "curves.csv"
    with curves.Curve(path, "round 1") as curve:
        curve.add(1, step=10, **VALUES)
        curve.flush()
        with open(path, "a") as file:
            file.write("round 2,10,1,1.0,0.")  # killed while it wrote, beside this training
        curve.add(2, step=20, **VALUES)
    assert epochs(path, "round 1") == [1, 2] and epochs(path, "round 2") == []


HEADER = "what,step,epoch,loss,accuracy,lr,images_per_second\n"


@pytest.mark.parametrize("content", [HEADER + "round 1,1,x,1,1,1,1\n", HEADER + "round 1,1\n", HEADER + 8 * "1," + "\n",
                                     "\n\n1\n", "x\n", "\xff\n", "\0\n"])
def test_a_table_that_is_none_is_named_and_left_as_it_is(tmp_path, content):
    path = tmp_path / "curves.csv"
    path.write_bytes(content.encode("latin1"))
    with pytest.raises(UserError, match="not a table of curves"):
        add_epochs(path, "round 1", 1, 1)
    assert path.read_bytes() == content.encode("latin1")


def test_a_table_that_cannot_be_written_does_not_hide_why_a_training_ended(tmp_path, monkeypatch):
    def no_room(path, rows):
        raise UserError("cannot write")

    monkeypatch.setattr(curves, "append", no_room)
    with pytest.raises(KeyboardInterrupt):
        with curves.Curve(tmp_path / "curves.csv", "round 1") as curve:
            curve.add(1, step=10, **VALUES)
            raise KeyboardInterrupt
    with pytest.raises(UserError, match="cannot write"):  # but it is said where nothing else is wrong
        add_epochs(tmp_path / "curves.csv", "round 1", 1, 1)
