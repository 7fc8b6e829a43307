"""Small networks, data and masks that several tests take, and a CUDA graph for those without a GPU."""
import torch
from PIL import Image

from common.data import Split
from common.networks import prunable
from common.streams import random_stream


def config(model="convnet3", **changes):
    return dict(model=model, channels=3, image_size=32, num_classes=10) | changes


def blobs(n=60, size=8, classes=3, seed=0):
    """A split of noisy constant images whose colour tells the class."""
    labels = torch.arange(n) % classes
    noise = torch.randn(n, 3, size, size, generator=random_stream(seed))
    return Split(noise + labels.view(-1, 1, 1, 1) - 1., labels)


def half_mask(model):
    """The mask of a random half of the weights."""
    return {name: torch.rand(weight.shape, generator=random_stream(9)) < .5 for name, weight in prunable(model).items()}


def write_pictures(place, images, classes, parts=("train", "val")):
    """<place>/<part>/<class>/<number>.png of arrays or PIL's pictures, in every part the same."""
    for part in parts:
        for i, (image, name) in enumerate(zip(images, classes)):
            folder = place / part / str(name)
            folder.mkdir(parents=True, exist_ok=True)
            picture = image if isinstance(image, Image.Image) else Image.fromarray(image.squeeze())
            picture.save(folder / f"{i:05}.png")


def equal(a, b):
    """Whether two values of files are the same, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


class StandIn:
    """For captured.CudaGraph: it runs `function` at every call, and leaves the results in the same tensors."""

    made = []

    def __init__(self, function):
        self.function, self.results = function, None
        self.made.append(self)

    def __call__(self):
        results = self.function()
        if self.results is None:
            self.results = [result.clone() for result in results]
        for own, result in zip(self.results, results):
            own.copy_(result)
        return self.results
