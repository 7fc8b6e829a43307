"""The campaign's malformed input (campaign.py), and numbers at the edge of float32."""
import campaign
import hessian
import pytest
import torch

import common
from common import UserError, random_stream


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("campaign")
    campaign.prepare(folder)
    return folder


def test_malformed_input_is_refused_in_one_line(workshop):
    cases, wrong = campaign.malformed_input(workshop, files=2)
    assert cases > 200 and wrong == []


CONFIG = dict(model="convnet3", channels=1, image_size=8, num_classes=2, width=16)
LABELS = torch.arange(40) % 2


@pytest.mark.parametrize("where", ["data", "weights", "last step"])
def test_what_is_not_finite_is_named(where):
    model, images, lr = common.build_network(CONFIG), torch.randn(40, 1, 8, 8), .01
    if where == "data":
        images[7, 0, 3, 3] = torch.inf
    elif where == "weights":
        model.conv2.weight.data[0, 0, 0, 0] = torch.nan
    else:
        lr = 1e300  # the loss of the only batch is finite, the weights after it are not
    with pytest.raises(UserError, match="became"):
        common.train(model, common.Split(images, LABELS), common.Recipe(1, lr, augment="none"), random_stream(0))


@pytest.mark.parametrize("images", [torch.zeros(40, 1, 8, 8), torch.full((40, 1, 8, 8), 3.),
                                    1e-40 * torch.randn(40, 1, 8, 8)],
                         ids=["zeros", "one colour", "denormal"])
def test_channels_without_variance_and_denormals_survive(images):
    model, split = common.build_network(CONFIG), common.Split(images, LABELS)
    mask = {name: torch.rand(weight.shape) < .1 for name, weight in common.prunable(model).items()}
    for sparse in ("off", "on"):
        recipe = common.Recipe(2, .1, augment="dsa", sparse=sparse)
        assert common.train(model, split, recipe, random_stream(0), mask).loss < 1
        assert common.evaluate(model, split, sparse=sparse).loss < 1
    _, diagonal, _ = hessian.exact_diagonal(model.eval(), images, LABELS, mask)
    assert all(h.isfinite().all() for h in diagonal.values())
