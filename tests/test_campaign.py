"""The campaign's malformed input (bench/campaign.py), numbers at the edge of float32, mutants that have a place."""
import campaign
import hessian
import mutants
import pytest
import torch
from samples import config

from common.data import Split
from common.errors import UserError
from common.evaluation import evaluate
from common.kernels import views
from common.networks import build_network, prunable
from common.streams import random_stream
from common.training import Recipe, train


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("campaign")
    campaign.prepare(folder)
    return folder


def test_malformed_input_is_refused_in_one_line(workshop):
    cases, wrong = campaign.malformed_input(workshop, count=2)
    assert cases > 200 and wrong == []


CONFIG = config(channels=1, image_size=8, num_classes=2, width=16)
LABELS = torch.arange(40) % 2


@pytest.mark.parametrize("where", ["data", "weights", "last step"])
def test_what_is_not_finite_is_named(where):
    model, images, lr = build_network(CONFIG), torch.randn(40, 1, 8, 8), .01
    if where == "data":
        images[7, 0, 3, 3] = torch.inf
    elif where == "weights":
        model.conv2.weight.data[0, 0, 0, 0] = torch.nan
    else:
        lr = 1e300  # the loss of the only batch is finite, the weights after it are not
    with pytest.raises(UserError, match="became"):
        train(model, Split(images, LABELS), Recipe(1, lr, augment="none"), random_stream(0))


@pytest.mark.parametrize("images", [torch.zeros(40, 1, 8, 8), torch.full((40, 1, 8, 8), 3.),
                                    1e-40 * torch.randn(40, 1, 8, 8)],
                         ids=["zeros", "one colour", "denormal"])
def test_channels_without_variance_and_denormals_survive(images):
    model, split = build_network(CONFIG), Split(images, LABELS)
    mask = {name: torch.rand(weight.shape) < .1 for name, weight in prunable(model).items()}
    for choice in ("off", "on"):
        views.skip_zeros.set(choice)
        assert train(model, split, Recipe(2, .1), random_stream(0), mask).loss < 1
        assert evaluate(model, split).loss < 1
    _, diagonal, _ = hessian.exact_diagonal(model.eval(), images, LABELS, mask)
    assert all(h.isfinite().all() for h in diagonal.values())


@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_every_mutant_has_its_place_in_the_kernels(name):
    text = (mutants.KERNELS / f"{name}.cuh").read_text()
    assert [before for before, _ in mutants.MUTANTS[name] if text.count(before) != 1] == []
