"""LPIPS, the perceptual distance of two pictures (arXiv:1801.03924), version 0.1.

The package `lpips` needs torchvision, and where that is installed transformers prepares pictures by it, with other numbers.
So the few layers are built here, and read torchvision's weights; the learnt weights of their channels come with ray_sd.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ray_sd.errors import ArtifactError, ConfigError, first_line
from ray_sd.finite import check_finite
from ray_sd.headers import is_safetensors

HEADS = Path(__file__).with_name("lpips_heads")
BATCH_SIZE = 8
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""How pixels in [-1, 1] are normalised."""


class Net(NamedTuple):
    """The convolutional half of a classifier, as torchvision numbers its layers."""

    name: str
    layers: list[nn.Module]
    taps: tuple[int, ...]
    """Layers whose outputs are compared."""


class PerceptualDistance:
    """LPIPS by the backbone in a file of weights. Raises ConfigError where there is none, or of another network."""

    def __init__(self, weights: str, device: torch.device | str, setting: str) -> None:
        state = _read(weights, setting)
        net = _net(state, weights, setting)
        self._layers = nn.Sequential(*net.layers)
        features = {
            name.removeprefix("features."): value for name, value in state.items() if name.startswith("features.")
        }
        try:
            check_finite(features, weights)
            self._layers.load_state_dict(features)
        except ArtifactError as error:
            raise ConfigError(f"{setting}: {error}") from error
        except RuntimeError as error:  # names what is missing, and what has another shape
            raise ConfigError(f"{setting}: {weights} is no whole {net.name}: {' '.join(str(error).split())}") from error
        self._layers.float().eval().requires_grad_(False).to(device)
        self._taps = net.taps
        self._heads = [head.to(device) for _, head in sorted(load_file(HEADS / f"{net.name}.safetensors").items())]
        self._shift, self._scale = (torch.tensor(values, device=device).view(3, 1, 1) for values in (SHIFT, SCALE))

    @classmethod
    def check(cls, weights: str, setting: str) -> None:
        """Raise ConfigError for a file of other weights."""
        cls(weights, "cpu", setting)

    @torch.inference_mode()
    def distances(self, pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> Tensor:
        """Of each pair of pictures, all of one size: [N], on the CPU."""
        found = []
        for first in range(0, len(pictures), BATCH_SIZE):
            one, other = (self._features(group[first : first + BATCH_SIZE]) for group in (pictures, others))
            # The sum over layers of the mean over places of Σ_c w_c (ŷ_c - ŷ0_c)², equation 1.
            found.append(
                sum(
                    torch.einsum("c,bchw->bhw", head, (a - b).square()).mean(dim=(1, 2))
                    for head, a, b in zip(self._heads, one, other, strict=True)
                )
            )
        return torch.cat(found).cpu()

    def _features(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """Of each compared layer [B, C, h, w], of length one at each place."""
        pixels = torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]))
        hidden = pixels.permute(0, 3, 1, 2).to(self._shift) / 127.5 - 1
        hidden = (hidden - self._shift) / self._scale
        found = []
        for number, layer in enumerate(self._layers):
            hidden = layer(hidden)
            if number in self._taps:
                found.append(hidden / (hidden.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return found


def _read(weights: str, setting: str) -> dict[str, Tensor]:
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"{setting}: there is no file {weights}; give torchvision's weights of AlexNet or VGG16, such as "
            "alexnet-owt-7be5be79.pth or vgg16-397923af.pth"
        )
    try:
        if is_safetensors(path.name):
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{setting}: {weights} cannot be read: {first_line(error)}") from error
    except Exception as error:  # torch raises whatever a damaged file, or a pickle of more than tensors, leads to
        raise ConfigError(f"{setting}: {weights} is no state dict of tensors alone: {first_line(error)}") from error


def _net(state: dict[str, Tensor], weights: str, setting: str) -> Net:
    first = state.get("features.0.weight") if isinstance(state, dict) else None
    for shape, build in NETS.items():
        if first is not None and tuple(first.shape) == shape:
            return build()
    raise ConfigError(f"{setting}: {weights} holds weights of neither AlexNet nor VGG16, as torchvision names them")


def _alexnet() -> Net:
    layers: list[nn.Module] = [
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    ]
    return Net("alexnet", layers, (1, 4, 7, 9, 11))


def _vgg16() -> Net:
    layers: list[nn.Module] = []
    taps = []
    channels = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        if layers:
            layers.append(nn.MaxPool2d(2))
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        taps.append(len(layers) - 1)
    return Net("vgg16", layers, tuple(taps))


NETS = {(64, 3, 11, 11): _alexnet, (64, 3, 3, 3): _vgg16}
"""By the shape of their first kernels."""
