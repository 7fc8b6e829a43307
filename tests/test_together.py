"""Several trainings in turns on one GPU, by a stand-in for CUDA graphs: each has the bits that it has alone."""
import os
import shutil
import signal
import sys
import threading
import time

import pytest
import torch
from samples import blobs, config, equal, half_mask
from torch import nn

import landscape
import prune
import stability
from common import files, interrupts, together
from common.data import Split
from common.errors import UserError
from common.interrupts import Stopped
from common.networks import build_network
from common.streams import random_stream
from common.training import Recipe, train_saved

CPU = torch.device("cpu")


def with_dropout():
    """A network of others', which draws from the global generators."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Dropout(.3), nn.Linear(16, 3))


def small(seed):
    return build_network(config(width=8, image_size=8, num_classes=3), seed)


# name: (network, mask, recipe) of trainings that differ in all that may differ
TRAININGS = {
    "short": lambda: (small(0), None, Recipe(1, lr=.05, batch_size=20)),
    "masked": lambda: (small(1), half_mask(small(1)), Recipe(3, lr=.05, batch_size=20)),
    "long": lambda: (small(2), None, Recipe(5, lr=.1, batch_size=20, cutmix=0.)),
    "dropout": lambda: (with_dropout(), None, Recipe(3, lr=.05, batch_size=16)),
}


def do(name, folder, device=CPU):
    """The state at the end of a training, which is saved in `folder` and gone on with from there."""
    model, mask, recipe = TRAININGS[name]()
    mask = mask and {weight: kept.to(device) for weight, kept in mask.items()}
    split, path = blobs(62), folder / f"{name}.pt"
    split = Split(split.images.to(device), split.labels.to(device))
    start = files.load(path, device) if path.exists() else None
    train_saved(path, {}, name, model.to(device), split, recipe, random_stream(7, name), mask, start=start)
    return model.state_dict()


def do_all(folder, device=CPU, **others):
    """{name: state} of all trainings; `others` {name: a function in the place of `do`}."""
    states = {}

    def function(name):
        states[name] = others.get(name, do)(name, folder, device)

    together.each(function, TRAININGS, device, "trainings")
    return states


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The states after each training by itself, without graphs."""
    return do_all(tmp_path_factory.mktemp("alone"))


def assert_same(states, wanted):
    assert states.keys() == wanted.keys()
    for name in wanted:
        assert states[name].keys() == wanted[name].keys()
        assert all(torch.equal(states[name][key], value) for key, value in wanted[name].items()), name


@pytest.fixture
def turns(graphs, monkeypatch):
    """The threads that handed on, in order, as they do after each step here; there are graphs."""
    threads, hand_on = [], together.hand_on

    def noted():
        threads.append(threading.current_thread())
        hand_on()

    monkeypatch.setattr(together, "STEPS", 1)
    monkeypatch.setattr(together, "hand_on", noted)
    return threads


@pytest.mark.parametrize("steps", [1, 3, together.STEPS])
def test_trainings_in_turns_have_the_bits_they_have_alone(alone, turns, tmp_path, monkeypatch, steps):
    monkeypatch.setattr(together, "STEPS", steps)
    threads, generator = threading.active_count(), torch.get_rng_state()
    assert_same(do_all(tmp_path), alone)
    assert threading.active_count() == threads and torch.equal(torch.get_rng_state(), generator)
    first, second, third, fourth = dict.fromkeys(turns)
    assert turns[:4] == [first, second, third, fourth]
    assert turns[-2:] == [third] * 2  # the long one, when the others are done


def test_on_a_cpu_nothing_is_done_together(monkeypatch):
    threads = []
    together.each(lambda item: threads.append(threading.current_thread()), [1, 2, 2], CPU, "items")
    assert threads == [threading.main_thread()] * 3


def test_where_memory_lacks_fewer_are_trained_at_a_time(alone, turns, tmp_path, capsys):
    def where_there_is_room(name, folder, device):
        runs = [thread for thread in threading.enumerate() if isinstance(thread, together.Run)]
        if len(runs) > 2:
            raise torch.OutOfMemoryError
        return do(name, folder, device)

    assert_same(do_all(tmp_path, **dict.fromkeys(TRAININGS, where_there_is_room)), alone)
    assert len(set(turns)) == 4 and capsys.readouterr().err.count("fewer at a time") == 1


def test_what_finds_no_memory_alone_says_so(graphs):
    def needs_much(item):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="CUDA"):
        together.each(needs_much, [1, 2], CPU, "items")


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    while not interrupts.asked.get()():  # until the main thread has heard of it
        time.sleep(.001)


def fail():
    raise UserError("nothing works")


@pytest.mark.parametrize("stop, error, unsaved", [(interrupt, Stopped, 0), (fail, UserError, 1)])
def test_a_stop_keeps_what_all_have_done_and_is_gone_on_from(alone, turns, tmp_path, monkeypatch, stop, error, unsaved):
    hand_on, stops, threads = together.hand_on, [stop], threading.active_count()

    def stop_once():
        hand_on()
        if len(turns) == 22 and stops:  # in the second epoch of all but the short one
            stops.pop()()

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(together, "hand_on", stop_once)
        do_all(tmp_path)
    saved = [files.load(path) for path in tmp_path.glob("*.pt")]
    assert len(saved) == 3 - unsaved and all(training["epochs_done"] == 1 for training in saved)
    assert threading.active_count() == threads
    assert_same(do_all(tmp_path), alone)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_streams_of_a_gpu_too(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    gpu = torch.device("cuda")
    one_by_one = {name: do(name, tmp_path / "one", gpu) for name in TRAININGS}
    assert_same(do_all(tmp_path / "all", gpu), one_by_one)


#############################################
#                 The scripts               #
#############################################

SEARCH = ["prune", "--dataset", "digits", "--data", "real", "--preset", "quick", "--width", "4", "--epochs", "2",
          "--train-images", "200", "--eval-epochs", "1", "--rounds", "2", "--evaluate", "2", "--seeds", "0", "1", "2",
          "--device", "cpu"]
LINES = ["stability", "--epochs", "3", "--from-epoch", "1", "--points", "3", "--device", "cpu", "--mask",
         "masks/seed0/r1.pt", "masks/seed1/r2.pt"]
PLANE = ["landscape", "--epochs", "2", "--plane", "paper", "--grid", "9", "--eval-images", "50", "--endpoints", "ends",
         "--device", "cpu", "--mask", "masks/seed0/r2.pt"]


def run(command, folder, monkeypatch):
    """One of the scripts in this process, with `folder` as the current one."""
    name, *arguments = command
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    {"prune": prune, "stability": stability, "landscape": landscape}[name].main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the scripts leave without graphs, one training after the other."""
    place = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        for command in (SEARCH, LINES, PLANE):
            run(command, place, patch)
    return place


@pytest.mark.parametrize("command, at_once, pattern", [
    (SEARCH, 3, "masks/**/*r?.pt"), (LINES, 2, "runs/stability/**/*.pt"), (PLANE, 4, "ends/**/*.pt")])
def test_scripts_train_together_what_they_train_alone(folder, command, at_once, pattern, tmp_path, monkeypatch, turns):
    if command != SEARCH:
        shutil.copytree(folder / "masks", tmp_path / "masks")
    run(command, tmp_path, monkeypatch)
    assert len(set(turns[:at_once])) == at_once
    names = sorted(path.relative_to(folder) for path in folder.glob(pattern))
    assert names and names == sorted(path.relative_to(tmp_path) for path in tmp_path.glob(pattern))
    for name in names:
        assert equal(files.load(folder / name), files.load(tmp_path / name)), name
