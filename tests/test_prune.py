"""Masks against published counts and torch's own pruning; the command line from end to end on the digits."""
import csv
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn.utils import prune as torch_prune

import prune
from common import curves, figures, files
from common.data import Split, load_real
from common.endpoints import endpoint
from common.errors import UserError
from common.evaluation import evaluate
from common.masks import apply_mask, dense_mask, magnitude_mask, sparsity
from common.networks import build_network, prunable
from common.overlap import overlap
from common.streams import random_stream
from common.tickets import FORMAT, family, fingerprint, load_ticket
from conftest import ROOT

CONFIG = dict(model="convnet3", channels=3, image_size=32, num_classes=10)
QUICK = ("--dataset", "digits", "--data", "real", "--width", 4, "--epochs", 2, "--eval-epochs", 2, "--train-images",
         200)


def rounds_of(network, count, rate=.2, **options):
    masks = [dense_mask(network)]
    for _ in range(count):
        masks.append(magnitude_mask(prunable(network), masks[-1], rate, **options))
    return masks


def zeros(mask):
    return sum(int((~kept).sum()) for kept in mask.values())


# ---------------------------------------------------------------- masks


def test_zeros_per_round_are_the_papers():
    masks = rounds_of(build_network(CONFIG), 6)
    assert [zeros(m) for m in masks[1:]] == [63770, 114786, 155598, 188248, 214368, 235264]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_masks_are_nested(scope):
    masks = rounds_of(build_network(CONFIG | {"width": 8}), 4, scope=scope)
    for earlier, later in zip(masks, masks[1:]):
        assert all((later[name] <= earlier[name]).all() for name in earlier)


def test_masks_equal_torchs_global_pruning():
    network = build_network(CONFIG | {"width": 16})
    expected = build_network(CONFIG | {"width": 16})
    layers = [(m, "weight") for m in expected.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    mask = dense_mask(network)
    for number in range(3):
        stream = random_stream(number)
        with torch.no_grad():  # other weights each round, as training would leave them
            for weight, (layer, _) in zip(prunable(network).values(), layers):
                fresh = torch.randn(weight.shape, generator=stream)
                weight.copy_(fresh)
                (layer.weight_orig if number else layer.weight).copy_(fresh)
                for hook in layer._forward_pre_hooks.values():
                    hook(layer, None)  # refreshes layer.weight, which torch ranks
        torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=.2)
        mask = magnitude_mask(prunable(network), mask, .2)
        assert all(torch.equal(kept, layer.weight_mask.bool()) for kept, (layer, _) in zip(mask.values(), layers))


def test_layer_scope_removes_the_same_share_of_every_layer():
    network = build_network(CONFIG | {"width": 8})
    for name, kept in rounds_of(network, 1, scope="layer")[1].items():
        assert int((~kept).sum()) == round(.2 * kept.numel())


@pytest.mark.parametrize("what", ["all", "weights"])
def test_rewinding(what):
    network = build_network(CONFIG | {"width": 4, "norm": "batch"})
    init = {name: value.clone() for name, value in network.state_dict().items()}
    trained = {name: value + 1 for name, value in init.items()}
    network.load_state_dict(trained)
    state = prune.rewound(network, init, prunable(network), what)
    for name, value in state.items():
        returned = what == "all" or name in prunable(network)
        assert torch.equal(value, init[name] if returned else trained[name]), name


def test_overlap_of_independent_masks_has_z_about_zero_and_ratio_one():
    scores = [overlap(torch.rand(5000, generator=random_stream(i)) < .3,
                            torch.rand(5000, generator=random_stream(-1, i)) < .1)
              for i in range(200)]
    z = torch.tensor([(shared - expected) / variance ** .5 for *_, shared, expected, variance in scores])
    assert abs(z.mean()) < .25 and abs(z.std() - 1) < .15


def test_overlap_of_a_mask_with_itself():
    mask = torch.arange(100) < 20
    assert overlap(mask, mask)[:5] == (100, 20, 20, 20, 4.)


# ---------------------------------------------------------------- the command line


def table(folder):
    with open(folder / "results.csv") as file:
        return list(csv.DictReader(file))


def masks_in(folder):
    return {path.stem: load_ticket(path)["masks"] for path in folder.glob("r*.pt")}


def same_masks(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[r][n], other[r][n]) for r in one for n in one[r])


@pytest.fixture
def run(tmp_path, monkeypatch):
    """prune.py's main in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: prune.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of three rounds on the digits, all subnetworks evaluated."""
    folder = tmp_path_factory.mktemp("finished")
    subprocess.run([sys.executable, ROOT / "prune.py", *map(str, QUICK), "--rounds", "3", "--evaluate",
                    "--out", folder / "masks"],
                   check=True, cwd=folder)
    return folder / "masks"


def test_a_run_leaves_masks_results_and_pictures(finished):
    rows = table(finished)
    trained = {f"trained_r{number}.pt" for number in range(4)}
    assert {p.name for p in finished.iterdir()} == trained | {"r0.pt", "r1.pt", "r2.pt", "r3.pt",
                                                    "results.csv", "curves.csv", "config.json", "prune.png"}
    assert [float(r["sparsity"]) for r in rows] == pytest.approx([0, .2, .36, .488], abs=.002)
    assert [int(r["training_points"]) for r in rows] == [0, 400, 800, 1200]
    assert all(0 < float(r["test_accuracy"]) <= 1 for r in rows)


def test_mask_files_are_self_contained(finished):
    ticket = torch.load(finished / "r3.pt", weights_only=True)
    network = build_network(ticket["config"], ticket["config"]["seed"])
    assert ticket["format"] == FORMAT and ticket["round"] == 3
    assert ticket["sparsity"] == sparsity(ticket["masks"])
    assert all(torch.equal(value, ticket["init"][name]) for name, value in network.state_dict().items())


def test_killed_run_goes_on_and_ends_with_the_same_masks(finished, tmp_path, run):
    command = [sys.executable, ROOT / "prune.py", *map(str, QUICK), "--rounds", "3", "--evaluate",
               "--out", tmp_path / "masks"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (tmp_path / "masks" / "r1.pt").exists():
        time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = (tmp_path / "masks" / "r1.pt").stat().st_mtime_ns
    run(*command[2:])
    assert same_masks(masks_in(tmp_path / "masks"), masks_in(finished))
    assert [r["test_accuracy"] for r in table(tmp_path / "masks")] == [r["test_accuracy"] for r in table(finished)]
    assert (tmp_path / "masks" / "r0.pt").stat().st_mtime_ns <= first


class Killed(BaseException):
    pass


@pytest.fixture
def dying(monkeypatch):
    """dying(n): trainings are saved after every step, and what runs is killed at the nth save."""
    def dying(number):
        def save_and_die(path, content):
            nonlocal number
            write(path, content)
            if path.name.startswith("training_"):
                number -= 1
                if number == 0:
                    raise Killed

        monkeypatch.setattr(files, "write_atomically", save_and_die)

    write, autosave = files.write_atomically, files.Autosave
    monkeypatch.setattr(files, "Autosave", lambda seconds=0: autosave(seconds=0))
    return dying


def test_killed_again_and_again_within_rounds_it_ends_with_the_same_bits(run, dying):
    # An epoch has 4 steps and is saved 5 times: the rewind point of 1, the rounds and the evaluation of 2: 35 saves.
    command = [*QUICK, "--rewind", 1, "--rounds", 2, "--evaluate", 2]
    run(*command, "--out", "whole")
    for deaths in range(10):
        dying(7)
        try:
            run(*command, "--out", "pieces")
            break
        except Killed:
            pass
    assert deaths == 5  # no step was made twice
    for path in Path("whole").glob("r*.pt"):
        one, two = load_ticket(path), load_ticket(Path("pieces", path.name))
        assert fingerprint(one) == fingerprint(two) and one["results"] == two["results"]
    whole, pieces = ([row | {"seconds": 0} for row in table(Path(folder))] for folder in ("whole", "pieces"))
    assert whole == pieces and not list(Path("pieces").glob("training_*"))
    whole, pieces = ([row | {"images_per_second": 0} for row in curves.read(Path(folder, "curves.csv"))]
                     for folder in ("whole", "pieces"))
    assert whole == pieces and len(whole) == 1 + 2 * 2 + 2  # no epoch stands twice, and none is missing


def test_an_unfinished_round_of_another_config_is_not_gone_on_with(finished, run, dying, tmp_path):
    dying(3)
    with pytest.raises(Killed):
        run(*QUICK, "--rounds", 1, "--lr", .5, "--out", "theirs")
    Path("ours").mkdir()
    shutil.copy("theirs/training_r1.pt", "ours")
    dying(0)
    run(*QUICK, "--rounds", 1, "--out", "ours")
    run(*QUICK, "--rounds", 1, "--out", "theirs", "--overwrite")
    for folder in ("ours", "theirs"):
        assert not Path(folder, "training_r1.pt").exists()
        assert fingerprint(load_ticket(f"{folder}/r1.pt")) == fingerprint(load_ticket(finished / "r1.pt"))


def test_a_run_whose_config_still_names_sparse_goes_on(finished, run):
    shutil.copytree(finished, "masks")
    config = files.load("masks/config.json")
    assert "sparse" not in config
    files.save("masks/config.json", config | {"sparse": "auto"})
    run(*QUICK, "--rounds", 3, "--sparse", "off")
    assert files.load("masks/config.json") == config and same_masks(masks_in(Path("masks")), masks_in(finished))


def test_one_seed_fixes_everything_and_another_changes_it(finished, tmp_path, run):
    run(*QUICK, "--rounds", 2, "--seeds", 0, 1, "--out", "masks")
    zero, one = masks_in(tmp_path / "masks" / "seed0"), masks_in(tmp_path / "masks" / "seed1")
    assert same_masks(zero, {r: m for r, m in masks_in(finished).items() if r != "r3"})
    assert not same_masks(zero, one)


def test_another_command_into_the_folder_is_refused_and_named(finished, run):
    with pytest.raises(UserError, match="lr 0.02 -> 0.5"):
        run(*QUICK, "--rounds", 3, "--lr", .5, "--out", finished)


def test_more_rounds_continue_a_run(finished, tmp_path, run):
    for rounds in (1, 2):
        run(*QUICK, "--rounds", rounds, "--out", "masks")
    assert same_masks(masks_in(tmp_path / "masks"), {r: m for r, m in masks_in(finished).items() if r != "r3"})


def test_random_masks_and_subset(tmp_path, run):
    run(*QUICK[:2], "--data", "random", "--width", 4, "--rounds", 2, "--out", "random")
    run(*QUICK[:2], "--data", "subset", "--ipc", 3, *QUICK[4:], "--rounds", 2, "--out", "subset")
    assert [int(r["training_points"]) for r in table(tmp_path / "subset")] == [0, 60, 120]
    assert [r["sparsity"] for r in table(tmp_path / "random")] == [r["sparsity"] for r in table(tmp_path / "subset")]
    kept = masks_in(tmp_path / "random")["r2"]["conv2.weight"].float().mean().item()
    assert abs(kept - .64) < .15  # random masks do not favour a layer
    assert not (tmp_path / "random" / "prune.png").exists()  # no accuracy, no images seen
    with pytest.raises(UserError, match="no accuracy to draw"):
        run("--plot", "random", "--out", "figures")
    run("--plot", "random", "subset", "--out", "figures")


def test_forty_families_look_different():
    looks = {str({**figures.style_of(i, ""), "label": ""}) for i in range(40)}
    assert len(looks) == 40


def test_start_goes_on_from_a_mask_and_rewind_moves_the_initial_state(finished, tmp_path, run):
    run(*QUICK, "--start", finished / "r2.pt", "--rounds", 3, "--out", "on")
    assert [int(r["round"]) for r in table(tmp_path / "on")] == [2, 3]
    start, end = masks_in(finished)["r2"], masks_in(tmp_path / "on")["r3"]
    assert all((end[name] <= start[name]).all() for name in start)
    run(*QUICK, "--rewind", 1, "--rounds", 1, "--out", "late")
    assert [int(r["training_points"]) for r in table(tmp_path / "late")] == [200, 600]
    with pytest.raises(UserError, match="of round 2 already"):
        run(*QUICK, "--start", finished / "r2.pt", "--rounds", 1, "--out", "back")
    late = load_ticket(tmp_path / "late" / "r1.pt")["init"]
    assert not torch.equal(late["conv1.weight"], load_ticket(finished / "r1.pt")["init"]["conv1.weight"])


@pytest.mark.parametrize("score, images_seen", [("magnitude", 0), ("snip", 30), ("grasp", 60), ("synflow", 0)])
def test_scores_prune_at_initialisation(score, images_seen, run):
    command = [*QUICK, "--data", "subset", "--ipc", 3, "--score", score, "--sparsity", .9]
    run(*command, "--rounds", 1, "--out", "one")
    run(*command, "--rounds", 3, "--out", "three")
    one, three = load_ticket("one/r1.pt"), load_ticket("three/r3.pt")
    for ticket in (one, three):
        assert ticket["sparsity"] == pytest.approx(.9, abs=2 / 364)
        assert torch.equal(ticket["init"]["conv1.weight"], build_network(ticket["config"]).conv1.weight)
    assert one["results"]["training_points"] == images_seen
    assert three["results"]["training_points"] == 3 * images_seen
    names = {"magnitude": "magnitude at initialisation", "snip": "SNIP, real subset, 3 a class",
             "grasp": "GraSP, real subset, 3 a class", "synflow": "SynFlow"}
    assert family(one["config"]) == names[score]
    if score == "magnitude":
        network = build_network(one["config"])
        assert same_masks({0: one["masks"]}, {0: magnitude_mask(prunable(network), dense_mask(network), .9)})


def test_sparsity_counts_from_the_start_mask(finished, run):
    run(*QUICK, "--score", "synflow", "--start", finished / "r2.pt", "--rounds", 4, "--sparsity", .9)
    assert load_ticket("masks/r4.pt")["sparsity"] == pytest.approx(.9, abs=.005)
    with pytest.raises(UserError, match="sparse in round 2 already"):
        run(*QUICK, "--start", finished / "r2.pt", "--rounds", 3, "--sparsity", .3)


def test_sanity_checks_change_the_tickets_and_not_the_search(finished, run):
    for rounds in (2, 3):  # the second command goes on
        run(*QUICK, "--rounds", rounds, "--shuffle", "--reinit", 7, "--out", "checked")
    fresh = build_network(load_ticket(finished / "r0.pt")["config"], 7).state_dict()
    for number in range(4):
        plain, checked = load_ticket(finished / f"r{number}.pt"), load_ticket(f"checked/r{number}.pt")
        assert fingerprint(plain) == fingerprint(checked | checked["found"])
        assert all(torch.equal(value, fresh[name]) for name, value in checked["init"].items())
        for name, kept in plain["masks"].items():
            assert kept.sum() == checked["masks"][name].sum()
    assert not torch.equal(plain["masks"]["conv2.weight"], checked["masks"]["conv2.weight"])
    assert family(checked["config"]) == "IMP, shuffled, drawn anew"


def test_kept_layers_are_no_part_of_the_mask(run, capsys):
    run(*QUICK, "--rounds", 2, "--keep", "linear.*", "conv1*", "--evaluate", 2, "--sparse", "on")
    shown = capsys.readouterr().out
    assert re.search(r"conv1.weight +4 x 1 x 3 x 3 +36  kept dense", shown)
    assert re.search(r"conv2.weight +4 x 4 x 3 x 3 +144  prunable", shown)
    assert re.search(r"norm2.weight +4 +4  norm", shown) and re.search(r"conv3.bias +4 +4  bias", shown)
    assert "prunable: 288 of 410 parameters" in shown
    ticket, trained = load_ticket("masks/r2.pt"), torch.load("masks/trained_r2.pt", weights_only=True)
    assert list(ticket["masks"]) == ["conv2.weight", "conv3.weight"]
    left = round(.8 * 288), round(.8 * round(.8 * 288))
    assert [int(row["remaining"]) for row in table(Path("masks"))] == [288, *left]
    assert float(table(Path("masks"))[2]["sparsity_of_all"]) == pytest.approx((288 - left[1]) / 410)
    assert ticket["sparsity"] == 1 - left[1] / 288
    assert trained["conv1.weight"].all() and not trained["conv2.weight"][~ticket["masks"]["conv2.weight"]].any()
    run(*QUICK, "--start", "masks/r2.pt", "--rounds", 3, "--out", "on")  # keeps what the mask keeps
    assert list(load_ticket("on/r3.pt")["masks"]) == ["conv2.weight", "conv3.weight"]
    with pytest.raises(UserError, match="the start mask prunes conv2.weight, conv3.weight; wanted"):
        run(*QUICK, "--start", "masks/r2.pt", "--rounds", 3, "--keep", "conv3*", "--out", "other")
    assert not Path("other", "r2.pt").exists()


def pruned_by_torch(ticket):
    """The network of a ticket as torch.nn.utils.prune makes it, with masks of ones."""
    network = build_network(ticket["config"], 99)
    for name in ticket["masks"]:
        layer, _, weight = name.rpartition(".")
        torch_prune.identity(network.get_submodule(layer), weight)
    return network


def test_export_loads_into_a_network_pruned_by_torch_and_comes_back(finished, run):
    run("--export", "pruned.pt", finished / "r3.pt")
    ticket = load_ticket(finished / "r3.pt")
    theirs, ours = pruned_by_torch(ticket), build_network(ticket["config"])
    theirs.load_state_dict(torch.load("pruned.pt", weights_only=True))
    ours.load_state_dict(ticket["init"])
    apply_mask(ours, ticket["masks"])
    images = torch.randn(5, 1, 8, 8, generator=random_stream(0))
    assert torch.equal(theirs(images), ours(images))
    assert fingerprint(load_ticket("pruned.pt", ticket["config"])) == fingerprint(ticket)
    for wrong in ("pruned.pt", finished / "trained_r3.pt"):
        with pytest.raises(UserError, match="neither a mask file"):
            run("--export", "again.pt", wrong)
    for there in (finished / "r3.pt", finished / "r2.pt"):
        with pytest.raises(UserError, match="is there already"):
            run("--export", there, finished / "r3.pt")


@pytest.mark.parametrize("kept", ["--start", "--distilled"])
def test_an_input_in_the_folder_of_results_is_refused(finished, run, tmp_path, kept):
    shutil.copytree(finished, tmp_path / "masks")
    (tmp_path / "link").symlink_to("masks")
    before = (tmp_path / "masks" / "r1.pt").read_bytes()
    for out in ("masks", "link"):
        with pytest.raises(UserError, match="choose another --out"):
            run(*QUICK, kept, tmp_path / "masks" / "r1.pt", "--out", out, "--overwrite")
    assert (tmp_path / "masks" / "r1.pt").read_bytes() == before


def test_the_config_of_something_else_is_not_replaced(run, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "config.json").write_text('{"factor": 2}')
    with pytest.raises(UserError, match="no run of prune.py"):
        run(*QUICK, "--out", "set", "--overwrite")
    assert (tmp_path / "set" / "config.json").read_text() == '{"factor": 2}'


def test_trained_networks_are_plain_states(finished, run):
    ticket = load_ticket(finished / "r3.pt")
    train_split, test_split = load_real(dict(ticket["config"]), "data")
    network = build_network(ticket["config"])
    network.load_state_dict(torch.load(finished / "trained_r3.pt", weights_only=True))
    assert evaluate(network, test_split).accuracy == ticket["results"]["test_accuracy"]
    trained = endpoint("runs", "r3", ticket, train_split, 0)
    run("--export", "state.pt", "runs/r3_order0.pt")
    network.load_state_dict(torch.load("state.pt", weights_only=True))
    assert all(torch.equal(value, trained["state"][name]) for name, value in network.state_dict().items())
    rows = curves.read(Path("runs", "curves.csv"))
    assert [(row["what"], row["epoch"]) for row in rows] == [("r3_order0", "1"), ("r3_order0", "2")]


def test_start_takes_a_torch_prune_state_dict(tmp_path, run):
    nn = torch.nn
    convolutions, linear = [nn.Conv2d(channels, 4, 3) for channels in (1, 4, 4)], nn.Linear(4, 10)
    norms = [nn.GroupNorm(4, 4) for _ in convolutions]
    layers = nn.Sequential(*[layer for pair in zip(convolutions, norms) for layer in pair], linear)
    for layer in [*convolutions, linear]:
        torch_prune.random_unstructured(layer, "weight", amount=.5)
    for norm in norms:
        nn.init.normal_(norm.weight)
    torch.save(layers.state_dict(), tmp_path / "theirs.pt")
    run(*QUICK, "--start", "theirs.pt", "--rounds", 1, "--out", "masks")
    ours = load_ticket(tmp_path / "masks" / "r0.pt")
    assert torch.equal(ours["masks"]["conv2.weight"], convolutions[1].weight_mask.bool())
    assert torch.equal(ours["init"]["linear.weight"], linear.weight_orig)
    assert torch.equal(ours["init"]["norm2.weight"], norms[1].weight)
    assert torch.equal(ours["init"]["conv3.bias"], convolutions[2].bias)


def test_plot_and_compare(finished, tmp_path, run, capsys):
    run(*QUICK[:2], "--data", "random", "--width", 4, "--rounds", 3, "--out", "random")
    rows = [{key: row[key] for key in row if key != "sparsity_of_all"} for row in table(tmp_path / "random")]
    files.save_csv(tmp_path / "random" / "results.csv", rows)  # as earlier versions wrote it
    run("--plot", finished, "random", "--out", "figures")
    run("--compare", finished, "random", "--out", "figures")
    assert "expected" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"prune.png", "compare.csv", "compare.png"}


@pytest.mark.parametrize("arguments, message", [
    (("--rate", 0), "--rate 0"), (("--rate", 1), "--rate 1"), (("--rate", -.1), "--rate"), (("--rounds", 0), "'0'"),
    (("--rounds", -3), "'-3'"), (("--dataset", "nowhere"), "nowhere"), (("--ipc", 7), "ipc 7"),
    (("--dataset", "cifar10", "--data", "real", "--data-dir", "empty"), "--dataset digits"),
    (("--model", "vgg"), "vgg"),
    (("--start", "missing.pt"), "missing.pt"), (("--distilled", "missing.pt"), "missing.pt"), (("--width", "x"), "'x'"),
    (("--keep", "conv7*"), "fits none"), (("--keep", "*"), "nothing to prune"), (("--sparsity", 1), "--sparsity 1"),
    (("--rate", .2, "--sparsity", .9), "--rate with --sparsity"), (("--score", "snip", "--data", "random"), "no score"),
    (("--out", ""), "--out: empty"), (("--distilled", " "), "--distilled: empty"),
    (("--export", "x.json", "r1.pt"), ".pt or .pth"), (("--export", ".", "r1.pt"), ".pt or .pth"),
    (("--rewind", -1), "'-1'"), (("--plot", "nothing"), "nothing"), (("--compare", "a", "b"), "in common")])
def test_bad_input_is_named_before_anything_is_written(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no download
    with pytest.raises(UserError, match=re.escape(message)):
        prune.main([str(a) for a in arguments])
    assert not (tmp_path / "masks").exists()


def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(refused):
    assert refused("prune.py", "--rate", 2) == "error: --rate 2: must lie between 0 and 1, both excluded"


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04"])
def test_files_that_are_no_masks(content, run, tmp_path):
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(UserError, match="bad.pt"):
        run(*QUICK, "--start", "bad.pt")


def test_mask_of_an_own_network_that_computes_while_it_is_built(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ownnet.py").write_text("""import torch
class Net(torch.nn.Sequential):
    def __init__(self, num_classes):
        width = int(torch.linspace(1, 8, 2).tolist()[-1])
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, width), torch.nn.Linear(width, num_classes))
        self.register_buffer("barred", torch.full((2,), -torch.inf))
""")
    prune.main(["--dataset", "digits", "--data", "real", "--model", "ownnet:Net", "--rounds", "1", "--epochs", "1"])
    assert load_ticket("masks/r1.pt", code="ownnet:Net")["round"] == 1
    with pytest.raises(UserError, match="--model ownnet:Net"):  # a file alone makes no code run
        load_ticket("masks/r1.pt")


def test_mask_of_another_network(finished, run):
    with pytest.raises(UserError, match="another network"):
        run(*QUICK, "--start", finished / "r1.pt", "--model", "resnet10", "--out", "masks")


def test_a_loss_that_becomes_nan_names_round_epoch_and_step(run, tmp_path):
    with pytest.raises(UserError, match=r"round 1: .* epoch \d+, step \d+"):
        run(*QUICK, "--norm", "none", "--lr", 1e8)
    assert (tmp_path / "masks" / "r0.pt").exists() and not (tmp_path / "masks" / "r1.pt").exists()


def test_full_disk_leaves_finished_rounds_intact(tmp_path):
    # A file size limit of the process acts like a full disk: r0.pt fits, the pictures do not.
    command = f"ulimit -f 24; exec {sys.executable} {ROOT / 'prune.py'} {' '.join(map(str, QUICK))} --rounds 2"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "cannot write" in done.stderr and "Traceback" not in done.stderr
    assert len(masks_in(tmp_path / "masks")) == 3 and not list((tmp_path / "masks").glob(".*"))


# ---------------------------------------------------------------- as a library


@pytest.fixture
def own():
    """A network of 36 + 576 prunable weights, and 40 images for it."""
    layers = torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 4)
    images = torch.randn(40, 1, 8, 8, generator=random_stream(0))
    return torch.nn.Sequential(*layers), Split(images, torch.arange(40) % 4)


def test_find_masks_of_an_own_network_and_tensors(own, tmp_path):
    network, split = own
    before = {name: value.clone() for name, value in network.state_dict().items()}
    out = str(tmp_path / "masks")
    rows = prune.find_masks(network, split, out, rounds=2, epochs=3, batch_size=16)
    ticket = load_ticket(f"{out}/r2.pt", model=network)
    assert [row["remaining"] for row in rows] == [612, 490, 392] and zeros(ticket["masks"]) == 612 - 392
    assert ticket["results"]["training_points"] == 2 * 3 * 40
    for state in (network.state_dict(), ticket["init"]):
        assert all(torch.equal(value, state[name]) for name, value in before.items())
    assert prune.find_masks(network, split, out, rounds=2, epochs=3, batch_size=16) == rows
    with pytest.raises(UserError, match="model None"):
        load_ticket(f"{out}/r2.pt")
    with pytest.raises(UserError, match="another network"):
        load_ticket(f"{out}/r2.pt", model=torch.nn.Linear(144, 4))


def test_find_masks_refuses_what_is_not_the_run_in_its_folder(own, tmp_path):
    network, split = own
    settings = dict(rounds=1, epochs=1, augment="none", cutmix=0)
    prune.find_masks(network, split, tmp_path, **settings)
    with pytest.raises(UserError, match="data_sha"):
        prune.find_masks(network, split.subset(torch.arange(30)), tmp_path, **settings)
    with pytest.raises(UserError, match="lr 0.01 -> 0.1"):
        prune.find_masks(network, split, tmp_path, lr=.1, **settings)
    with pytest.raises(UserError, match="no setting 'epoch'"):
        prune.find_masks(network, split, tmp_path, epoch=1)
    with pytest.raises(UserError, match="real="):
        prune.find_masks(network, split, tmp_path, evaluate=[1], **settings)


def test_evaluating_leaves_random_masks_and_their_weights_alone(own, tmp_path):
    network, split = own
    rows = prune.find_masks(network, None, tmp_path, (split, split), evaluate=(0,), rounds=1, eval_epochs=1,
                            rewind_what="weights")
    init = load_ticket(tmp_path / "r1.pt", model=network)["init"]
    assert 0 <= rows[0]["test_accuracy"] <= 1 and rows[1]["test_accuracy"] == ""
    assert all(torch.equal(value, init[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_within_a_round_saves_and_says_so(tmp_path, script, number, code):
    command = [sys.executable, str(ROOT / "prune.py"), "--dataset", "digits", "--data", "real", "--width", "8",
               "--train-images", "300", "--epochs", "60", "--eval-epochs", "1", "--rounds", "2", "--out", "masks"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "masks" / "r1.pt", process)
    time.sleep(.3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("it was done before the signal came")
    assert process.returncode == code and "stopped" in errors and "Traceback" not in errors
    assert (tmp_path / "masks" / "training_r2.pt").exists()
    for out in ("masks", "undisturbed"):
        assert script(*[Path(command[1]).name], *command[2:-1], out).returncode == 0
    ends = [load_ticket(tmp_path / out / "r2.pt")["masks"] for out in ("masks", "undisturbed")]
    assert all(torch.equal(ends[0][name], kept) for name, kept in ends[1].items())
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("training_*"))


@pytest.mark.parametrize("redirection, code", [(">&-", 0), ("2>&-", 0), ("<&- >&- 2>&-", 0), ("| true", 141),
                                               (">/dev/full", 2)])
def test_streams_that_are_closed_or_full_cost_no_traceback(tmp_path, redirection, code):
    random_masks = f"{sys.executable} {ROOT / 'prune.py'} --dataset digits --data random --width 4 --rounds 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {random_masks} {redirection}"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert (tmp_path / "masks" / "r1.pt").exists() or code


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None
        time.sleep(.02)


def test_a_first_try_that_failed_does_not_claim_the_folder(run, tmp_path):
    with pytest.raises(UserError, match="round 1"):
        run(*QUICK, "--norm", "none", "--lr", 1e8, "--out", "masks")
    run(*QUICK, "--norm", "none", "--lr", .01, "--out", "masks")
    assert (tmp_path / "masks" / "r1.pt").exists()


@pytest.mark.parametrize("arguments, message", [
    (("--rate", "1e-9"), "removes none"), (("--evaluate", 99), "--rounds"),
    (("--rate", ".9999", "--rounds", 3), "all weights")])
def test_a_search_that_comes_to_nothing_says_so(run, arguments, message):
    with pytest.raises(UserError, match=message):
        run(*QUICK, *arguments, "--out", "masks")
