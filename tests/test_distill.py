"""Matching against direct second derivatives and closed forms; files, resumption and mistakes on digits."""
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import distill
from common import files
from common.data import DATASETS, Split, load_real
from common.distilled import decode_tiles, load_distilled
from common.errors import UserError
from common.networks import build_network
from common.streams import random_stream

DIGITS = {"dataset": "digits", "ipc": 2, "factor": 2, "seed": 3, "augment": "dsa", "cutmix": .5}


def digits(method, **changes):
    """(training split, config) of a small run."""
    config = DIGITS | distill.DEFAULTS | distill.SETTINGS[method] | {"method": method}
    real, _ = load_real(config, "data")
    small = {"width": 8, "outer": 2, "inner": 3, "real_images": 8, "network_images": min(64, config["network_images"])}
    return real, config | small | changes


def train_steps(run, real, config, count):
    members = distill.class_members(real, config)
    for _ in range(count):
        distill.iterate(run, real, members, config)
    return run


def begin(real, config):
    return distill.begin(real, distill.class_members(real, config), config)


# ---------------------------------------------------------------- synthetic images


@pytest.mark.parametrize("size, factor", [(8, 1), (8, 2), (32, 2), (28, 3), (9, 3)])
def test_decoding_gives_back_what_was_encoded(size, factor):
    colours = torch.rand(2 * factor ** 2, 3, 1, 1, generator=random_stream(0)).expand(-1, -1, size, size)
    stored = distill.encode_tiles(colours, factor)
    assert stored.shape == (2, 3, size, size)
    decoded, _ = decode_tiles(stored, torch.zeros(2, dtype=torch.long), factor)
    if size % factor == 0:  # else the last tiles end in padding
        torch.testing.assert_close(decoded, colours)


def test_the_sheet_and_data_pt_hold_the_same_set(tmp_path):
    real, config = digits("select")
    distill.distill(real, config, tmp_path)
    files.save(tmp_path / "config.json", config)
    sheet, data = (load_distilled(tmp_path / name, DATASETS["digits"], 2) for name in ("sheet.png", "data.pt"))
    assert len(sheet) == 10 * 2 * 4
    torch.testing.assert_close(sheet.images, data.images, rtol=0, atol=1e-6)
    assert torch.equal(sheet.labels, data.labels)


def test_one_channel_of_28_pixels_keeps_its_shape(tmp_path):
    real, config = digits("dm", channels=1, image_size=28, ipc=1, factor=3)
    images = F.interpolate(real.images[:200].float(), size=(28, 28)).byte()
    distill.distill(Split(images, real.labels[:200], (.13,), (.31,)), config, tmp_path)
    stored, labels = files.load(tmp_path / "data.pt")
    assert stored.shape == (10, 1, 28, 28) and labels.tolist() == list(range(10))
    files.save(tmp_path / "config.json", config)
    for name in ("data.pt", "sheet.png"):
        assert len(load_distilled(tmp_path / name, DATASETS["mnist"], 1)) == 10 * 9


# ---------------------------------------------------------------- matching


def test_gradient_matching_equals_the_second_derivative_written_out():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 2, 2), nn.Flatten(), nn.Linear(8, 3)).double()
    real, synthetic = torch.randn(4, 1, 5, 5).double(), torch.randn(2, 1, 5, 5).double().requires_grad_()

    def gradient(images):
        loss = F.cross_entropy(network(images), torch.full((len(images),), 1))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [network[0].weight, network[2].weight],
                                                                   create_graph=True)])

    jacobian = torch.autograd.functional.jacobian(gradient, synthetic).flatten(1)  # d gradient / d pixel
    difference = (gradient(synthetic) - gradient(real)).detach()
    for metric, outer in (("mse", 2 * difference), ("l1", difference.sign())):
        loss = distill.gradient_distance(network, real, synthetic, 1, metric)
        torch.testing.assert_close(torch.autograd.grad(loss, synthetic)[0].flatten(), jacobian.T @ outer)
    torch.testing.assert_close(loss, difference.abs().sum())


def test_embedding_matching_is_the_squared_distance_of_means():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))  # the embedding is the image itself
    real, synthetic = torch.randn(5, 3, 2, 2), torch.randn(2, 3, 2, 2).requires_grad_()
    difference = synthetic.detach().mean(0) - real.mean(0)
    loss = distill.embedding_distance(network, real, synthetic, 1)
    torch.testing.assert_close(loss, difference.square().sum())
    torch.testing.assert_close(torch.autograd.grad(loss, synthetic)[0], difference.expand(2, -1, -1, -1))
    with_term = distill.embedding_distance(network, real, synthetic, 1, cross_entropy=2.)
    logarithms = network(synthetic).softmax(1)[:, 1].log()
    torch.testing.assert_close(with_term - loss, -2 * logarithms.mean())


@pytest.mark.parametrize("method", ["dm", "idm", "idc"])
def test_a_small_step_lowers_the_loss_by_what_its_gradient_says(method):
    real, config = digits(method)
    run, members = begin(real, config), distill.class_members(real, config)
    network = build_network(config, 0)

    def loss():
        return distill.match(network, run.images, real, members, config, random_stream("one draw"))

    before, slope = loss(), run.images.grad.clone()
    small = 1e-4 * before / float(slope.square().mean()) / slope[0].numel()  # match() returns the mean of the classes
    run.images.data -= small * slope
    assert before - loss() == pytest.approx(1e-4 * before, rel=.1)


def test_average_pooling_replaces_every_stride():
    config = {"model": "resnet10ap", "norm": "instance", "channels": 3, "image_size": 96, "num_classes": 4, "width": 4}
    network = build_network(config, 0)
    assert all(m.stride == (1, 1) for m in network.modules() if isinstance(m, nn.Conv2d))
    assert not any(isinstance(m, nn.MaxPool2d) for m in network.modules())
    assert network(torch.zeros(2, 3, 96, 96)).shape == (2, 4)


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("method", ["idm", "idc"])
def test_a_resumed_run_ends_with_the_same_set(method, tmp_path):
    real, config = digits(method)
    straight = distill.distill(real, config, tmp_path / "straight")
    distill.save_run(train_steps(begin(real, config), real, config, 4), tmp_path / "killed", config)
    resumed = distill.distill(real, config, tmp_path / "killed")
    assert torch.equal(straight.images, resumed.images) and straight.losses == resumed.losses
    again = distill.distill(real, config | {"seed": 4}, tmp_path / "other seed")
    assert not torch.equal(straight.images, again.images)


def test_memory_stays_flat():
    real, config = digits("idc", inner=20)

    def tensors():
        gc.collect()
        return sum(o.numel() for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter))

    run = train_steps(begin(real, config), real, config, 3)
    before = tensors()
    assert tensors() == before and train_steps(run, real, config, 6) and tensors() == before


def test_a_loss_that_is_not_finite_keeps_the_last_set(tmp_path):
    real, config = digits("idm")
    run = train_steps(begin(real, config), real, config, 1)
    distill.save_run(run, tmp_path, config)
    kept = (tmp_path / "data.pt").read_bytes()
    run.network.linear.weight.data[0] = torch.nan
    distill.save_run(run, tmp_path, config)
    with pytest.raises(UserError, match="nan at iteration 1; the set before it is kept; try a lower --image-lr"):
        distill.distill(real, config, tmp_path)
    assert (tmp_path / "data.pt").read_bytes() == kept


def test_the_command_measures_what_it_made(script, tmp_path):
    made = script("distill.py", "--dataset", "digits", "--ipc", 1, "--budget", .02, "--epochs", 20, "--out", "set")
    assert made.returncode == 0, made.stderr
    written = {path.name for path in (tmp_path / "set").iterdir()}
    assert written == {"data.pt", "sheet.png", "config.json", "checkpoint.pt", "curves.csv"}
    kept = files.load(tmp_path / "set" / "config.json")
    assert "distill.py --dataset digits --ipc 1" in kept["command"]
    assert len(kept["accuracy"]["values"]) == 2 and kept["iterations"] > 0
    measured = script("distill.py", "--dataset", "digits", "--ipc", 1, "--evaluate", "set/sheet.png", "--epochs", 20)
    assert f"{100 * kept['accuracy']['mean']:.2f} +- " in measured.stdout


@pytest.mark.parametrize("flags, message", [
    (["--ipc", 500], "training images; --ipc 500 --factor 1 starts from 500"),
    (["--factor", 9], "--factor 9 cuts images of 8 pixels"),
    (["--evaluate", "nothing.pt"], "nothing.pt: no such file"),
    (["--method", "magic"], "magic")])
def test_mistakes_are_one_line(refused, flags, message, tmp_path):
    assert message in refused("distill.py", "--dataset", "digits", *flags)
    assert list(tmp_path.iterdir()) == []


def test_a_class_without_images_is_named():
    real, config = digits("dm")
    with pytest.raises(UserError, match="class 9 has 0 training images"):
        distill.class_members(real.subset(real.labels < 9), config)


def test_a_set_of_others_is_not_replaced(tmp_path):
    for name in ("data.pt", "sheet.png", "config.json"):
        (tmp_path / name).mkdir(parents=True)
        with pytest.raises(UserError, match=f"holds {name}"):
            distill.load_checkpoint(tmp_path, {}, "cpu")
        (tmp_path / name).rmdir()


def test_another_run_in_the_same_folder_is_refused(tmp_path):
    real, config = digits("select")
    distill.distill(real, config, tmp_path)
    with pytest.raises(UserError, match="a run with another seed"):
        distill.distill(real, config | {"seed": 4}, tmp_path)


def test_a_network_without_an_embedding_is_refused():
    with pytest.raises(UserError, match="nn.Sequential with its classifier last, not a Linear"):
        distill.embedding_and_classifier(nn.Linear(2, 3))
