"""common/spectrum.py against polynomials and eigenvalues of dense matrices in float64."""
import pytest
import torch
from torch import nn

from common import spectrum
from common.masks import apply_mask
from common.networks import ConvNet3, prunable
from common.streams import random_stream


def symmetric(n=30):
    A = torch.randn(n, n, dtype=torch.float64, generator=random_stream(0))
    return A + A.T


def network_and_batch(sparsity=.5):
    torch.manual_seed(0)
    model = ConvNet3(3, 8, 3, 2).double().eval()
    mask = {name: torch.rand(weight.shape) >= sparsity for name, weight in prunable(model).items()}
    apply_mask(model, mask)
    return model, torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4) % 3, mask


def dense_hessian(model, images, labels):
    """The Hessian [P, P] over all parameters, laid end to end."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [p.numel() for p in parameters.values()]

    def loss(flat):
        parts = zip(parameters.items(), flat.split(sizes))
        named = {name: part.view_as(p) for (name, p), part in parts}
        return nn.functional.cross_entropy(torch.func.functional_call(model, named, (images,)), labels)

    flat = torch.cat([p.flatten() for p in parameters.values()])
    return torch.autograd.functional.hessian(loss, flat)


def surviving(model, mask):
    """bool [P]: which of all parameters, laid end to end, survive."""
    return torch.cat([mask.get(name, torch.ones_like(p, dtype=torch.bool)).flatten()
                      for name, p in model.named_parameters()])


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_the_quadrature_is_exact_for_polynomials_of_degree_2k_minus_1(steps):
    A, v = symmetric(), torch.randn(30, dtype=torch.float64, generator=random_stream(1))
    values, weights = spectrum.lanczos(lambda x: A @ x, v, steps)
    exact, power = [], v / v.norm()
    for degree in range(2 * steps + 1):
        exact.append(float(v @ power / v.norm()))
        power = A @ power
    found = [float((weights * values ** degree).sum()) for degree in range(2 * steps + 1)]
    assert found[:-1] == pytest.approx(exact[:-1], rel=1e-10)
    assert found[-1] != pytest.approx(exact[-1], rel=1e-6)  # the next one is not


def test_as_many_steps_as_dimensions_give_every_eigenvalue_once():
    """Without orthogonalising again some come twice, and others not at all."""
    A = symmetric() + torch.diag(torch.logspace(0, 6, 30, dtype=torch.float64))
    values, _ = spectrum.lanczos(lambda x: A @ x, torch.ones(30, dtype=torch.float64), 30)
    assert torch.allclose(values, torch.linalg.eigvalsh(A), rtol=1e-9)


def test_a_start_that_reaches_few_eigenvectors_ends_early():
    A = torch.diag(torch.tensor([1., 1., 5., 5., 9.], dtype=torch.float64))
    values, weights = spectrum.lanczos(lambda x: A @ x, torch.ones(5, dtype=torch.float64), 5)
    reached = weights > 1e-12
    assert torch.allclose(values[reached], A.diag().unique()) and weights.sum() == pytest.approx(1)
    assert torch.allclose(weights[reached], torch.tensor([.4, .4, .2], dtype=torch.float64))


def test_surviving_weights_have_the_eigenvalues_of_the_submatrix():
    *network, mask = network_and_batch()
    kept = surviving(network[0], mask)
    dense = dense_hessian(*network)
    for parts, matrix in ((mask, dense[kept][:, kept]), (None, dense)):
        eigenvalues = torch.linalg.eigvalsh(matrix)
        found = spectrum.Hessian(*network, parts).spectrum(probes=2, steps=60)
        assert found.n == len(matrix)
        for end in (0, -1):
            assert float(found.values[:, end].mean()) == pytest.approx(float(eigenvalues[end]), rel=1e-6)


def test_the_density_and_its_error_against_all_eigenvalues():
    """Over 400 places in the range of the eigenvalues, two standard errors hold about 95%."""
    *network, mask = network_and_batch()
    kept = surviving(network[0], mask)
    eigenvalues = torch.linalg.eigvalsh(dense_hessian(*network)[kept][:, kept])
    found = spectrum.Hessian(*network, mask).spectrum(probes=16, steps=40)
    places, width = torch.linspace(-9, 9, 400, dtype=torch.float64), .4
    density, error = found.density(places, width)
    normal = torch.distributions.Normal(eigenvalues, torch.tensor(width, dtype=torch.float64))
    misses = (density - normal.log_prob(places[:, None]).exp().mean(1)).abs()
    assert eigenvalues.abs().max() < 7  # far from the ends of the places
    assert (misses <= 2 * error + 1e-9).double().mean() > .9 and (misses <= 4 * error + 1e-9).all()
    assert float(torch.trapezoid(density, places)) == pytest.approx(1, abs=1e-6)


def test_the_error_of_several_batches_is_over_batches():
    values = torch.tensor([[[0.], [0.]], [[1.], [1.]]])
    density, error = spectrum.Spectrum(values, torch.ones(2, 2, 1), 5).density(torch.zeros(1), .1)
    peak = 1 / (.1 * (2 * torch.pi) ** .5)
    assert float(density) == pytest.approx(peak / 2) and float(error) == pytest.approx(peak / 2)


class Attention(nn.Module):
    """Attention as a layer and as a function, whose fast kernels have no second derivative."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.embed(x).flatten(2).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(nn.functional.scaled_dot_product_attention(x, x, x).mean(1))


def test_products_through_attention_against_differences_of_gradients():
    torch.manual_seed(0)
    model = Attention().double().eval()
    images, labels = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4) % 3
    parameters = list(model.parameters())
    product = spectrum.Hessian(model, images, labels)
    v = torch.randn(len(product.kept), dtype=torch.float64)
    parts = [part.view_as(p) for part, p in zip(v.split(product.sizes), parameters)]

    found, ends = product.product(v), []
    for step in (-1e-5, 2e-5):
        with torch.no_grad():
            torch._foreach_add_(parameters, parts, alpha=step)
        loss = nn.functional.cross_entropy(model(images), labels)
        ends.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    assert torch.allclose(found, (ends[1] - ends[0]) / 2e-5, atol=1e-6 * float(found.abs().max()))
