"""Mask files of others and of strangers; which runs are one family; where results lie."""
import argparse
import random

import pytest
import torch
from PIL import Image
from samples import write_pictures
from torch import nn
from torch.nn.utils import prune as torch_prune

from common import data, files, tickets
from common.data import Split
from common.endpoints import check_apart, endpoint, real_recipe, result_names
from common.errors import UserError
from common.masks import dense_mask
from common.networks import build_network
from common.tickets import changed_setting, family_names, load_ticket, make_ticket

CONFIG = dict(model="convnet3", dataset="digits", width=4, norm="batch", channels=1, image_size=8, num_classes=10,
              data="real", seed=0, eval_epochs=3, lr=.02)

#############################################
#     State dicts of torch.nn.utils.prune   #
#############################################


def pruned_network(choose):
    """A network of CONFIG as after some training, some of its layers pruned, and the masks."""
    network = build_network(CONFIG, seed=5)
    for parameter in network.parameters():
        parameter.data += .1 * torch.randn_like(parameter)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(.5, 2)
    masks = dense_mask(network)
    for name in [name for name in masks if choose.random() < .7] or ["conv1.weight"]:
        layer = network.get_submodule(name.removesuffix(".weight"))
        torch_prune.random_unstructured(layer, "weight", amount=choose.choice([.2, .5, .9]))
        masks[name] = layer.weight_mask.bool()
    return network, masks


@pytest.mark.parametrize("seed", range(12))
def test_all_that_a_prune_state_holds_is_used(tmp_path, seed):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    network, masks = pruned_network(choose)
    wanted = {name: network.state_dict().get(name, network.state_dict().get(f"{name}_orig"))
              for name in build_network(CONFIG).state_dict()}
    masks_as = choose.choice([lambda m: m, torch.Tensor.bool, torch.Tensor.byte, torch.Tensor.double])
    state = {name: masks_as(value) if name.endswith("_mask") else value for name, value in network.state_dict().items()}
    if choose.random() < .5:
        state = {f"module.{name}": value for name, value in state.items()}
    if choose.random() < .5:
        state = {"epoch": 3, choose.choice(["state_dict", "model", "net"]): state}
    torch.save(state, tmp_path / "theirs.pth")
    ticket = load_ticket(tmp_path / "theirs.pth", CONFIG)
    assert ticket["init"].keys() == wanted.keys() and ticket["masks"].keys() == masks.keys()
    assert all(torch.equal(ticket["init"][name], value) for name, value in wanted.items())
    assert all(torch.equal(ticket["masks"][name], value) for name, value in masks.items())


@pytest.mark.parametrize("change, message", [
    (lambda state: state | {"conv1.weight_mask": state["conv1.weight_mask"] * .5}, "soft mask"),
    (lambda state: state | {"conv1.bias_mask": torch.ones(4)}, "conv1.bias_mask"),
    (lambda state: {k: v for k, v in state.items() if "norm2" not in k}, "norm2"),
    (lambda state: state | {"extra.weight": torch.ones(3)}, "extra"),
    (lambda state: state | {"conv2.weight_orig": torch.ones(4, 4, 5, 5)}, "conv2"),
    (lambda state: {"epoch": 1}, "epoch")])
def test_what_does_not_fit_is_named(tmp_path, change, message):
    network = build_network(CONFIG)
    for name in ("conv1", "conv2"):
        torch_prune.l1_unstructured(network.get_submodule(name), "weight", amount=.5)
    torch.save(change(network.state_dict()), tmp_path / "theirs.pt")
    with pytest.raises(UserError, match=message):
        load_ticket(tmp_path / "theirs.pt", CONFIG)


def test_a_mask_file_makes_no_code_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('ran', 'w')\n")
    network = build_network(CONFIG)
    ticket = make_ticket(1, dense_mask(network), network.state_dict(), CONFIG | {"model": "evil:x"}, {})
    files.save(tmp_path / "r1.pt", ticket)
    with pytest.raises(UserError, match="--model evil:x"):
        load_ticket(tmp_path / "r1.pt", code="convnet3")
    assert not (tmp_path / "ran").exists()


#############################################
#            Families and identity          #
#############################################


@pytest.mark.parametrize("key, value", [("lr", .1), ("scope", "layer"), ("epochs", 7), ("distilled", "sets/other.pt"),
                                        ("cutmix", 0.), ("rewind_what", "weights"), ("batch_size", 32)])
def test_runs_that_differ_in_more_than_the_seed_are_two_families(key, value):
    config = CONFIG | {"data": "distilled", "ipc": 10, "distilled": "sets/one.pt"}
    one, other = family_names([config, config | {key: value}])
    assert one != other
    assert len(set(family_names([config, config | {"seed": 1}, config | {"eval_epochs": 9}]))) == 1


def test_a_set_is_told_by_its_content_not_by_its_path():
    one = CONFIG | {"data": "distilled", "ipc": 10, "distilled": "a/set.pt", "distilled_fingerprint": "aa"}
    moved, other = one | {"distilled": "b/set.pt"}, one | {"distilled_fingerprint": "bb"}
    assert len(set(family_names([one, moved]))) == 1 and len(set(family_names([one, other]))) == 2
    assert changed_setting(one, moved) is None
    assert changed_setting(one, other) == "distilled_fingerprint"
    assert changed_setting(one, one | {"data_fingerprint": "cc"}) is None  # real data that was not read before
    assert changed_setting(one | {"data_fingerprint": "dd"}, one | {"data_fingerprint": "cc"}) == "data_fingerprint"


def test_masks_of_other_data_are_not_mixed():
    network = build_network(CONFIG)
    found = [make_ticket(1, dense_mask(network), network.state_dict(), CONFIG | {"data_fingerprint": sha}, {})
             for sha in ("aa", "bb", None)]
    assert tickets.common_config({"a": found[0], "c": found[2]})["data_fingerprint"] == "aa"
    with pytest.raises(UserError, match="other data"):
        tickets.common_config({"a": found[0], "b": found[1]})


def test_masks_of_data_that_was_renamed_are_of_one_dataset():
    network = build_network(CONFIG)
    found = [make_ticket(1, dense_mask(network), network.state_dict(), CONFIG | {"dataset": name} | more, {})
             for name, more in (("old", {"data_fingerprint": "aa"}), ("new", {"data_fingerprint": "aa"}), ("new", {}))]
    assert tickets.common_config({"a": found[0], "b": found[1]})["data_fingerprint"] == "aa"
    with pytest.raises(UserError, match="dataset new"):
        tickets.common_config({"a": found[0], "c": found[2]})


def arguments(**given):
    flags = "model", "width", "norm", "image_size", "dataset", "train_images", "seed"
    return argparse.Namespace(**dict.fromkeys(flags) | {"data_dir": "none"} | given)


@pytest.mark.parametrize("given", [{"model": "resnet10"}, {"width": 8}, {"norm": "instance"}, {"image_size": 9}])
def test_flags_of_another_network_than_the_masks_are_refused(given):
    with pytest.raises(UserError, match="leave the flag out"):
        tickets.check_flags(arguments(**given), CONFIG)
    tickets.check_flags(arguments(**{key: CONFIG[key] for key in given}), CONFIG)
    tickets.check_flags(arguments(width=128), CONFIG | {"width": None})  # the usual one


def test_a_network_of_the_users_own_may_be_named_beside_its_masks(tmp_path, monkeypatch):
    (tmp_path / "own_of_masks.py").write_text("from torch import nn\n\ndef net(num_classes):\n"
                                              "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n")
    monkeypatch.chdir(tmp_path)
    config = CONFIG | {"model": "own_of_masks:net", "width": None, "norm": None}
    tickets.check_flags(arguments(model="own_of_masks:net"), config)
    with pytest.raises(UserError, match="--image-size 9: .* leave the flag out"):
        tickets.check_flags(arguments(image_size=9), config)


def test_what_is_not_averaged_has_a_name_of_its_own():
    changes = {}, {"eval_epochs": 9}, {"seed": 5}, {"lr": .5}, {"scope": "layer"}, {"keep": ["conv1*"]}, {"reinit": 3}
    for sparsity in (.2, 0.):
        held = [{"config": CONFIG | {"data": "real"} | change, "sparsity": sparsity} for change in changes]
        assert len(set(tickets.labels(held))) == len(changes)
    assert tickets.labels(held[:1]) == ["dense"]


def test_pictures_are_read_in_the_size_that_the_masks_hold(tmp_path):
    pictures = [Image.new("RGB", (9 + i, 8), (60 * i, 9, 9)) for i in range(4)]
    write_pictures(tmp_path / "pictures", pictures, [0, 0, 1, 1])
    config = CONFIG | {"dataset": "elsewhere", "channels": 3, "num_classes": 2}
    read = dict(dataset=str(tmp_path / "pictures"), image_size=8)
    data.load_real(read, "none")
    network = build_network(config)
    files.save(tmp_path / "r1.pt", make_ticket(1, dense_mask(network), network.state_dict(),
                                               config | {"data_fingerprint": read["data_fingerprint"]}, {}))
    _, train, _ = tickets.load_tickets([tmp_path / "r1.pt"], arguments(dataset=str(tmp_path / "pictures")), "cpu")
    assert train.images.shape == (4, 3, 8, 8)


def test_two_masks_of_one_name_have_two_places(tmp_path):
    network = build_network(CONFIG)
    one = make_ticket(5, dense_mask(network), network.state_dict(), CONFIG, {})
    mask = {name: kept & (torch.rand(kept.shape) < .5) for name, kept in one["masks"].items()}
    other = make_ticket(5, mask, network.state_dict(), CONFIG, {})
    names = result_names({tmp_path / "e1/masks/r5.pt": one, tmp_path / "e2/masks/r5.pt": other,
                          tmp_path / "e3/masks/r5.pt": one})
    first, second, third = map(str, names.values())
    assert first == third == "masks/r5" and second.startswith("masks/r5-")
    with pytest.raises(UserError, match="another --out"):
        check_apart(tmp_path / "e1" / ".." / "e1" / "masks" / "r5.pt", names)


def test_a_file_of_something_else_is_no_endpoint_and_stays(tmp_path):
    network = build_network(CONFIG)
    ticket = make_ticket(1, dense_mask(network), network.state_dict(), CONFIG, {})
    files.save(tmp_path / "r1_order0.pt", ticket)
    split = Split(torch.randn(4, 1, 8, 8), torch.arange(4))
    with pytest.raises(UserError, match="is none"):
        endpoint(tmp_path, "r1", ticket, split, 0, overwrite=True)
    assert load_ticket(tmp_path / "r1_order0.pt")["round"] == 1


def test_endpoints_have_a_recipe_of_their_own():
    config = CONFIG | {"batch_size": 64}
    assert (real_recipe(config).lr, real_recipe(config).epochs) == (.02, 3)
    assert real_recipe(config | {"eval_lr": .1}).lr == .1
    assert real_recipe(config | {"eval_lr": .1}, lr=.3, epochs=9, batch_size=16)[:2] == (9, .3)


def test_a_folder_in_use_is_refused(tmp_path):
    with files.owned(tmp_path / "out"):
        with pytest.raises(UserError, match="in use"):
            with files.owned(tmp_path / "out"):
                pass
    with files.owned(tmp_path / "out"):
        assert (tmp_path / "out" / ".lock").exists()
    assert not (tmp_path / "out" / ".lock").exists()
