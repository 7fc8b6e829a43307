"""Distil a dataset into a few synthetic images a class, and measure what such a set is worth.

    python distill.py --dataset cifar10 --ipc 10        makes distilled/cifar10_ipc10/{data.pt, sheet.png, config.json}
    python distill.py --evaluate PATH --dataset cifar10 --ipc 10 --repeats 3
                                                        trains networks from scratch on a set, its own or published

Every stored image holds factor x factor tiles (IDC's multi-formation), so --ipc 10 --factor 2 trains on 40 images a
class. All methods start from real images, made small and tiled; --method says how they are then optimised:

    select   not at all
    dm       distribution matching (Zhao & Bilen 2023): mean embeddings of real and synthetic images agree, in
             networks drawn at random
    idm      the same in networks on their way through training on real data, with a cross-entropy term (improved
             distribution matching, Zhao et al. 2023). The default on a CPU
    idc      gradient matching in networks on their way through training (Kim et al. 2022), as the paper's data was
             made. The default with CUDA

The same command again goes on where an interrupted run stopped and ends with the same set.
"""
import io
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

import common
from common import UserError, random_stream

METHODS = {
    "select": dict(outer=0, inner=0, network_images=0, real_images=0, image_lr=0.),
    "dm": dict(outer=2000, inner=1, network_images=0, real_images=64, image_lr=.005),
    "idm": dict(outer=100, inner=40, network_images=256, real_images=64, image_lr=.005),
    "idc": dict(outer=2000, inner=100, network_images=2000, real_images=64, image_lr=.005),
}

#############################################
#             Synthetic images              #
#############################################


def encode_tiles(images, factor):
    """The inverse of common.decode_tiles: images [ipc * factor**2, C, H, W], made small, as tiles of [ipc, C, H, W]."""
    size = images.shape[-1]
    tile = -(-size // factor)
    tiles = F.interpolate(images, size=(tile, tile), mode="bilinear", antialias=True, align_corners=False)
    rows = tiles.unflatten(0, (factor, factor, -1)).permute(2, 3, 0, 4, 1, 5)
    return rows.flatten(4, 5).flatten(2, 3)[:, :, :size, :size].clamp(0, 1)


def members(split, label):
    return (split.labels == label).nonzero().squeeze(1)


def initial_images(real, config, stream):
    """Random real images of every class as tiles: [classes, ipc, C, H, W] in [0, 1]."""
    count = config["ipc"] * config["factor"] ** 2
    images = []
    for label in range(config["num_classes"]):
        own = members(real, label)
        chosen = own[torch.randperm(len(own), generator=stream)[:count]]
        images.append(encode_tiles(real.images[chosen].float() / 255, config["factor"]))
    return torch.stack(images)


def decode(images, real, factor):
    """Stored images [ipc, C, H, W] of one class -> what a network sees: [ipc * factor**2, C, H, W], normalised."""
    mean, std = (images.new_tensor(v).view(-1, 1, 1) for v in (real.mean, real.std))
    tiles, _ = common.decode_tiles(images, torch.zeros(len(images), dtype=torch.long), factor)
    return (tiles - mean) / std


#############################################
#                 Matching                  #
#############################################


def embedding_distance(network, real, synthetic, label, config):
    """Squared distance of the mean embeddings of two batches (Zhao & Bilen 2023, Eq. 5)."""
    embed = nn.Sequential(*list(network.children())[:-1])
    with torch.no_grad():
        goal = embed(real).mean(0)
    embedding = embed(synthetic)
    return (embedding.mean(0) - goal).square().sum()


def distill(real, config, out):
    """Optimise synthetic images [classes, ipc, C, H, W] of the split `real`."""
    seed = config["seed"]
    images = initial_images(real, config, random_stream(seed, "init")).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=config["image_lr"], betas=(.5, .95))
    bar = tqdm(range(config["outer"] * config["inner"]), desc=config["method"], disable=None)
    start = time.monotonic()
    for outer in range(config["outer"]):
        network = common.build_network(config, seed * 1_000_003 + outer)
        for inner in range(config["inner"]):
            stream = random_stream(seed, "iteration", outer, inner)
            optimizer.zero_grad()
            total = 0
            for label in range(config["num_classes"]):
                own = members(real, label)
                batch, _ = real.batch(own[torch.randperm(len(own), generator=stream)[:config["real_images"]]])
                draw = common.draw_dsa(stream, config["flip"])
                synthetic = common.dsa(decode(images[label], real, config["factor"]), draw)
                loss = embedding_distance(network, common.dsa(batch, draw), synthetic, label, config)
                loss.backward(inputs=[images])
                total += loss.item()
            optimizer.step()
            images.data.clamp_(0, 1)
            bar.update()
            bar.set_postfix(loss=f"{total:.4g}")
            if time.monotonic() - start > 60 * config["budget"]:
                return images.detach()
    return images.detach()


def contact_sheet(images):
    """PNG bytes of images [classes, ipc, C, H, W] in [0, 1]: a row a class, a column an image, undecoded."""
    classes, ipc, channels, size, _ = images.shape
    pixels = (images * 255).round().byte().permute(0, 3, 1, 4, 2).reshape(classes * size, ipc * size, channels)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(2).cpu().numpy()).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def main():
    parser = common.Parser(__doc__)
    flag = parser.add_argument
    flag("--dataset", default="cifar10")
    flag("--data-dir", default="data")
    flag("--ipc", type=common.positive, default=10)
    flag("--factor", type=common.positive, default=2)
    flag("--method", choices=METHODS, default="dm")
    flag("--width", type=common.positive)
    flag("--budget", type=float, default=1e9, metavar="MINUTES")
    flag("--seed", type=int, default=0)
    flag("--out", required=True)
    args = parser.parse_args()
    config = METHODS[args.method] | vars(args) | dict(model="convnet3")
    real, test = common.load_real(config, args.data_dir)
    images = distill(real, config, args.out)
    out = Path(args.out)
    common.write_atomically(out / "sheet.png", contact_sheet(images))
    command = shlex.join(["python", *sys.argv])
    common.save(out / "config.json", config | dict(command=command))
    images = (images * 255).round() / 255
    common.save(out / "data.pt", [images.flatten(0, 1), torch.arange(len(images)).repeat_interleave(args.ipc)])


if __name__ == "__main__":
    common.run(main)
