"""Where a network turns sparse: the choice from given times, and the file that keeps measured ones."""
import json
import multiprocessing
import time

import pytest
import torch

from common.kernels import crossover, ops, views
from common.networks import blocks_of, build_network, prunable

pytestmark = pytest.mark.skipif(not ops.load(), reason="needs the extension")

COSTS = [(1., 0., .8, 1.), (4., .1, .5, 10.), (3., .1, .2, 4.)]  # dense, change of layout, sparse at 0, per density


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(crossover, "memory", {})
    return tmp_path


def network(model="convnet3"):
    torch.manual_seed(0)
    return build_network(dict(model=model, width=8, channels=3, image_size=32, num_classes=10))


def kept_file(folder):
    path, = folder.rglob("*.json")
    return path


@pytest.mark.parametrize("densities, start", [
    ([.1, .1, .1], 0),   # 0.9 + 1.5 + 0.6 of 8 s
    ([.9, .1, .1], 1),   # the first block is dense: 1 + 0.1 + 1.5 + 0.6
    ([.9, .9, 0.], 2),   # 1 + 4 + 0.1 + 0.2
    ([.5, .5, .5], 3),   # from block 2 on 7.3 s
    ([1., 1., .25], 3),  # from block 2 on 6.3: less than 25% gained
])
def test_the_start_has_the_least_time(densities, start):
    assert crossover.best_start(COSTS, densities) == start


def test_densities_are_those_of_the_masks():
    model = network("resnet10")
    mask = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in prunable(model).items()}
    mask["stage2_1.conv1.weight"][:4] = False
    kept = {name: (mask[name].sum().item(), mask[name].numel()) for name in mask if name.startswith("stage2_1")}
    densities = crossover.densities_of(model, mask)
    assert len(kept) == 3 and densities[2] == sum(n for n, _ in kept.values()) / sum(m for _, m in kept.values())
    assert densities[:2] + densities[3:] == [1.] * 4


def test_auto_asks_the_times(monkeypatch):
    model = network()
    mask = {name: torch.rand(weight.shape) < .1 for name, weight in prunable(model).items()}
    for dense_time, way in (1., "sparse"), (1e-9, "dense"):
        monkeypatch.setattr(crossover, "costs_of", lambda _: [(dense_time, 0., .01, .01)] * 3)
        assert views.path(model, mask) == way
    monkeypatch.setattr(crossover, "costs_of", lambda _: [(1e-9, 0., 1., 1.), (1., 0., .1, .1), (1., 0., .1, .1)])
    assert views.path(model, mask) == "sparse from conv2"


def test_nothing_is_timed_of_a_network_that_is_hardly_pruned(monkeypatch):
    monkeypatch.setattr(crossover, "costs_of", None)
    model = network()
    assert crossover.first_sparse_block(model, {name: w == w for name, w in prunable(model).items()}) == 3


def test_times_are_measured_once_and_kept(empty_cache):
    measured = []
    for _ in range(3):
        assert crossover.kept_costs('{"network": "a"}', lambda: measured.append(1) or COSTS) == COSTS
        crossover.memory.clear()  # as another process would
    assert len(measured) == 1
    crossover.kept_costs('{"network": "b"}', lambda: COSTS)
    assert len(list(empty_cache.rglob("*.json"))) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"about": {}, "costs": [[1, 2, 3, 4]]}',
                                     '{"about": {"network": "a"}, "costs": [[1, 2]]}',
                                     '{"about": {"network": "a"}, "costs": [["x", 2, 3, 4]]}'])
def test_a_damaged_file_is_made_again(empty_cache, content):
    about = '{"network": "a"}'
    crossover.kept_costs(about, lambda: [(0., 0., 0., 0.)])
    kept_file(empty_cache).write_text(content)
    crossover.memory.clear()
    assert crossover.kept_costs(about, lambda: COSTS) == COSTS
    assert [tuple(row) for row in json.loads(kept_file(empty_cache).read_text())["costs"]] == COSTS


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    assert crossover.kept_costs("{}", lambda: COSTS) == COSTS


def measuring(folder, results):
    def measure():
        (folder / f"measured{time.monotonic_ns()}").touch()
        time.sleep(.3)
        return [(float(time.monotonic_ns()), 0., 0., 0.)]

    results.put(crossover.kept_costs('{"network": "a"}', measure))


def test_of_several_processes_one_measures(empty_cache):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=measuring, args=(empty_cache, results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert all(costs == found[0] for costs in found) and len(list(empty_cache.glob("measured*"))) == 1


@pytest.mark.parametrize("model", ["convnet3", "resnet10"])
def test_measuring_gives_positive_times_and_leaves_the_network_and_the_generators_alone(model, capsys):
    own = network(model).eval()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    generator = torch.get_rng_state()
    with torch.no_grad():
        costs = crossover.costs_of(own)
    assert len(costs) == len(blocks_of(own)) and all(row[0] > 0 for row in costs)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state()) and not own.training
    assert "timed where sparse layers pay" in capsys.readouterr().err
    assert crossover.costs_of(own) == costs


@pytest.mark.parametrize("settings, side", [(dict(model="convnet3", image_size=32), 32),
                                            (dict(model="convnet3", image_size=28), 28),
                                            (dict(model="convnet3", image_size=96), 96),
                                            (dict(model="resnet10", image_size=28), 28),
                                            (dict(model="resnet10", image_size=96), 96)])
def test_the_images_timed_are_those_the_network_was_built_for(settings, side):
    model = build_network(settings | dict(width=8, channels=1, num_classes=3))
    assert crossover.image_side(model) == side
