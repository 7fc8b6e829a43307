"""hessian.py against second derivatives by their definition in float64, closed forms, identities, linear algebra."""
import csv
from collections import Counter

import pytest
import torch
from torch import nn

import hessian
from common import files
from common.errors import UserError
from common.masks import apply_mask, dense_mask
from common.networks import ConvNet3, ResNet, prunable
from common.streams import random_stream
from random_networks import outcome, second_derivative


def mixed():
    """Group norms of several channels, max pooling, grouped, strided and dilated convolutions, a norm of features."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(4, 8, 3, 2, 1, groups=2), nn.InstanceNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=2, dilation=2),
        nn.GroupNorm(1, 4), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 6), nn.GroupNorm(2, 6), nn.ReLU(),
        nn.Linear(6, 3))


NETWORKS = {
    "convnet3 instance": lambda: ConvNet3(3, 8, 3, 6, "instance"),
    "convnet3 batch": lambda: ConvNet3(3, 8, 3, 6, "batch"),
    "convnet3 none": lambda: ConvNet3(3, 8, 3, 6, "none"),
    "resnet batch": lambda: ResNet((1, 1), 3, 8, 3, 4, "batch"),
    "resnet instance": lambda: ResNet((1, 1), 3, 8, 3, 4, "instance"),
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.ReLU(), nn.Linear(3, 3)),
    "mixed": mixed,
}


def prepared(make, n=3, sparsity=0., dtype=torch.float64, size=8, classes=3):
    """A network in eval mode with nothing left at a special value, its mask, images and labels."""
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    for module in model.modules():
        if isinstance(module, (nn.GroupNorm, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, .5, 1.5)
            nn.init.normal_(module.bias, 0, .3)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, .3)
            module.running_var.uniform_(.5, 2)
    mask = {name: torch.rand(weight.shape) >= sparsity for name, weight in prunable(model).items()}
    apply_mask(model, mask)
    return model, mask, torch.randn(n, 3, size, size, dtype=dtype), torch.arange(n) % classes


def by_definition(model, mask, images, labels):
    """{parameter name: tensor} of second derivatives along each weight by itself."""
    diagonal = {}
    for name, parameter in model.named_parameters():
        def along(unit):
            return second_derivative(model, images, labels, {name: unit})

        units = torch.eye(parameter.numel(), dtype=parameter.dtype).view(-1, *parameter.shape)
        entries = torch.vmap(along, chunk_size=128)(units).detach().view_as(parameter)
        diagonal[name] = entries * mask.get(name, True)
    return diagonal


def flat(diagonal):
    return torch.cat([h.flatten() for h in diagonal.values()])


@pytest.mark.parametrize("sparsity", [0, .6])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_entry_against_the_definition(name, sparsity):
    model, mask, images, labels = prepared(NETWORKS[name], sparsity=sparsity)
    _, diagonal, method = hessian.exact_diagonal(model, images, labels, mask)
    truth = flat(by_definition(model, mask, images, labels))
    assert (flat(diagonal) - truth).abs().max() < 1e-9 * truth.abs().max()
    curved = any(isinstance(module, nn.GroupNorm) for module in model.modules())
    assert method == ("exact (structured)" if curved else "exact (Gauss-Newton, piecewise linear)")


def test_random_networks_are_exact_or_refused():
    outcomes = Counter(outcome(seed) for seed in range(40))
    assert outcomes["exact"] > 20 and outcomes["refused"] > 4


@pytest.mark.parametrize("make", [lambda: ConvNet3(3, 32, 10),
                                  lambda: ResNet((2, 2, 2, 2), 3, 32, 10, 32)],
                         ids=["convnet3", "resnet18"])
def test_full_size_in_float32_against_hessian_vector_products(make):
    model, mask, images, labels = prepared(make, n=1, sparsity=.5, dtype=torch.float32, size=32, classes=10)
    diagonal = flat(hessian.exact_diagonal(model, images, labels, mask).whole)
    product = hessian.Hessian(model, images, labels, mask)
    for i in torch.randperm(len(diagonal))[:50]:
        assert abs(product.entry(i) - diagonal[i]) < 1e-4 * diagonal.abs().max()


def test_zeros_are_exact():
    model, mask, images, labels = prepared(NETWORKS["convnet3 instance"], sparsity=.6, dtype=torch.float32)
    loss_part, diagonal, _ = hessian.exact_diagonal(model, images, labels, mask)
    for name, kept in mask.items():
        assert (diagonal[name][~kept] == 0).all() and (diagonal[name][kept] != 0).any()
    assert all((diagonal[f"conv{i}.bias"] == 0).all() for i in (1, 2, 3))
    assert (flat(loss_part) >= 0).all()


def test_scale_invariance_under_instance_norm():
    """L(2 w) = L(w) for the weights into a norm without eps, so that their second derivatives fall to a quarter."""
    model, mask, images, labels = prepared(NETWORKS["convnet3 instance"])
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 0
    before = hessian.exact_diagonal(model, images, labels, mask).whole
    with torch.no_grad():
        model.conv2.weight.mul_(2)
    after = hessian.exact_diagonal(model, images, labels, mask).whole
    assert torch.allclose(after["conv2.weight"], before["conv2.weight"] / 4, rtol=1e-9)
    assert torch.allclose(after["conv1.weight"], before["conv1.weight"], rtol=1e-8)


def test_closed_form_of_a_linear_classifier():
    model, mask, images, labels = prepared(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), n=5)
    _, diagonal, _ = hessian.exact_diagonal(model, images, labels, mask)
    p = model(images).softmax(1).detach()
    truth = torch.einsum("nk,nx->kx", p * (1 - p), images.flatten(1).square()) / 5
    assert torch.allclose(diagonal["1.weight"], truth, rtol=1e-12)


def test_threads_change_nothing():
    model, mask, images, labels = prepared(NETWORKS["convnet3 instance"], n=9)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(flat(hessian.exact_diagonal(model, images, labels, mask).whole))
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(*results, rtol=1e-12, atol=1e-15)


def test_top_eigenvalue_against_dense_linear_algebra():
    model, mask, images, labels = prepared(lambda: ConvNet3(3, 8, 3, 2), sparsity=.5)
    product = hessian.Hessian(model, images, labels, mask)
    dense = torch.stack([product.product(e) for e in torch.eye(len(product.kept), dtype=torch.float64)])
    assert torch.allclose(dense.diag(), flat(by_definition(model, mask, images, labels)), atol=1e-13)
    top, error = product.top_eigenvalue(random_stream(0))
    assert abs(top - torch.linalg.eigvalsh(dense)[-1]) <= error <= .001 * top


def test_error_bars_cover_the_truth():
    """20 seeds x 5 figures: one standard error covers about 68%, two about 95%."""
    model, mask, images, labels = prepared(lambda: ConvNet3(3, 8, 3, 3), n=4, sparsity=.5)
    loss_part, diagonal, _ = hessian.exact_diagonal(model, images, labels, mask)
    h = torch.cat([diagonal[name].flatten() for name in mask])
    trace = flat(diagonal).sum()
    truth = {"mean": h.mean(), "std": h.std(correction=0), "mean_abs": h.abs().mean(), "trace": trace,
             "gauss_newton_share": flat(loss_part).sum() / trace}
    misses = []
    for seed in range(20):
        figures, _, _ = hessian.measure_estimate(model, images, labels, mask, 60, 40, random_stream(seed, "test"))
        misses += [abs(figures["all"][name][0] - value) / figures["all"][name][1] for name, value in truth.items()]
    misses = torch.tensor(misses)
    assert .5 < (misses < 1).float().mean() < .85 and (misses < 2).float().mean() > .85


def test_an_estimate_whose_sample_is_all_weights_has_their_extremes_exactly():
    model, mask, images, labels = prepared(lambda: ConvNet3(3, 8, 3, 3), sparsity=.5)
    exact, _, _ = hessian.measure_exact(model, images, labels, mask, random_stream(0, "test"))
    estimate, _, _ = hessian.measure_estimate(model, images, labels, mask, 9999, 3, random_stream(0, "test"))
    for scope in ("all", "surviving"):
        for name in ("min", "max", "mean_abs"):
            assert float(estimate[scope][name][0]) == pytest.approx(float(exact[scope][name][0]), rel=1e-9)
            assert float(estimate[scope][name][1]) == 0


def test_what_the_exact_way_lacks_is_named():
    images, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.GELU(), nn.Flatten(), nn.Linear(72, 3))
    with pytest.raises(UserError, match="GELU.*--method estimate"):
        hessian.exact_diagonal(model, images, labels, {})
    mask = dense_mask(model)
    estimated, diagonals, label = hessian.measure_estimate(model, images, labels, mask, 5, 5, random_stream(0))
    assert "estimate" in label and estimated["all"]["mean"][1] > 0 and not diagonals


@pytest.mark.parametrize("layer, name", [
    (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 2, 3)), "ParametrizedConv2d.* in 0"),
    (nn.Conv2d(3, 2, 3, padding="same"), "padding=same"), (nn.InstanceNorm2d(3, track_running_stats=True), "track_run"),
    (nn.AdaptiveMaxPool2d(2), "AdaptiveMaxPool2d")])
def test_layers_without_a_rule_are_named(layer, name):
    model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(3)).eval()
    model(torch.randn(2, 3, 8, 8))
    with pytest.raises(UserError, match=f"no rule for .*{name}.*--method estimate"):
        hessian.exact_diagonal(model, torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))


def test_batchnorm_in_train_mode_is_refused():
    with pytest.raises(UserError, match="norm1.*train mode"):
        hessian.check_eval_mode(ConvNet3(3, 8, 3, 2, "batch").train())


def test_frozen_parameters_have_derivatives_too():
    model, mask, images, labels = prepared(NETWORKS["convnet3 batch"])
    before = hessian.measure_exact(model, images, labels, mask, random_stream(0))[0]
    model.requires_grad_(False)
    assert hessian.measure_exact(model, images, labels, mask, random_stream(0))[0] == before
    assert hessian.measure_estimate(model, images, labels, mask, 5, 3, random_stream(0))[0]["all"]["mean"][0] != 0


@pytest.mark.parametrize("survivors", [1, 2])
def test_a_network_of_few_weights(survivors):
    """conv2 has none left, so nothing depends on the images, and every entry is 0."""
    model, _, images, labels = prepared(NETWORKS["convnet3 instance"])
    mask = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in prunable(model).items()}
    mask["conv1.weight"].view(-1)[:survivors] = True
    apply_mask(model, mask)
    exact = hessian.measure_exact(model, images, labels, mask, random_stream(0))[0]["surviving"]
    estimate = hessian.measure_estimate(model, images, labels, mask, 5, 3, random_stream(0))[0]["surviving"]
    for name in ("min", "max", "mean", "std", "mean_abs"):
        assert exact[name] == (0, 0) and estimate[name] == (0, 0)
    assert exact["trace"][0] > 0  # of the classifier's biases


def test_an_entry_that_is_not_finite_is_named():
    model, mask, images, labels = prepared(NETWORKS["convnet3 none"], dtype=torch.float32)
    with torch.no_grad():
        model.linear.weight.fill_(3e38)  # finite, but no sum of them
    with pytest.raises(UserError, match=r"diagonal is (nan|inf) at conv1.weight\[0, 0, 0, 0\]"):
        hessian.exact_diagonal(model, images, labels)
    with pytest.raises(UserError, match=r"product with the Hessian is (nan|inf) at conv1.weight\[0, 0, 0, 0\]"):
        hessian.measure_estimate(model, images, labels, mask, 5, 3, random_stream(0))


def test_zero_is_not_missing_in_the_table():
    assert hessian.cells({"min": 0., "max": .5, "mean": 0., "std": 0.})[:3] == ("0 / 0.5", "0 +- 0", "")


def test_script_writes_and_reuses_its_results(script, refused, tmp_path):
    command = ["--dataset", "digits", "--width", 3, "--epochs", 1, "--batch", 8, "--batches", 2, "--dtype", "float64"]
    first = script("hessian.py", *command)
    assert first.returncode == 0, first.stderr
    assert "exact (structured)" in first.stdout and "surviving" in first.stdout
    out = tmp_path / "runs" / "hessian"
    rows = list(csv.DictReader(open(out / "hessian.csv")))
    assert [row["scope"] for row in rows] == ["all", "surviving"] and (out / "hessian.png").exists()
    saved = files.load(out / "digits" / "dense_hessian.pt")
    h = torch.cat([saved["diagonal"][name].flatten() for name in saved["masks"]])
    assert float(rows[0]["mean"]) == pytest.approx(float(h.mean()), rel=1e-9)
    endpoint = tmp_path / "runs" / "stability" / "digits" / "dense_order0.pt"
    point = files.load(endpoint)
    point["state"]["conv2.weight"][0] = float("nan")
    files.save(endpoint, point)
    again = script("hessian.py", *command).stdout
    trained = [line for line in first.stdout.splitlines() if "epoch" in line]
    assert [line for line in first.stdout.splitlines() if line not in trained] == again.splitlines()
    assert "conv2.weight" in refused("hessian.py", *command, "--out", "other")
    files.save(tmp_path / "mine" / "digits" / "dense_hessian.pt", {"format": "mine"})
    assert "is none" in refused("hessian.py", *command, "--out", "mine")


def test_a_spectrum_is_added_to_a_result(script, tmp_path, monkeypatch):
    command = ["--dataset", "digits", "--width", 2, "--epochs", 1, "--batch", 8, "--method", "estimate", "--probes", 3,
               "--weights", 2]
    assert script("hessian.py", *command).returncode == 0
    out = tmp_path / "runs" / "hessian"
    before = files.load(out / "digits" / "dense_hessian.pt")
    done = script("hessian.py", *command, "--spectrum", 2)
    assert done.returncode == 0 and "spectrum.csv" in done.stdout, done.stderr
    after = files.load(out / "digits" / "dense_hessian.pt")
    assert after["scopes"] == before["scopes"] and "spectrum" not in before
    assert list(after["spectrum"]) == ["probes", "surviving"]
    assert after["spectrum"]["surviving"]["values"].shape == (1, 2, 80)
    rows = list(csv.DictReader(open(out / "spectrum.csv")))
    assert len(rows) == 1000 and (out / "hessian.png").exists()
    total = sum(float(row["density"]) for row in rows) * (float(rows[1]["eigenvalue"]) - float(rows[0]["eigenvalue"]))
    assert total == pytest.approx(1, abs=1e-3)


def test_too_large_a_batch_is_refused(refused):
    assert "2000" in (line := refused("hessian.py", "--dataset", "digits", "--batch", 2000)) and "1437" in line
