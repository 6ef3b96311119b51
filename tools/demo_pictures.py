"""The pictures that the demo checkpoint is trained on, with their licences, and those that it is measured on.

Every picture ships inside the scikit-image and scikit-learn packages (development dependencies), so nothing is
downloaded. Some of their pictures are left out because no free licence is stated for them: `moon`, `page`, `logo`,
`color`, `phantom` and the Middlebury `motorcycle` pair. `astronaut` and `chelsea` are the test pictures, and are never
trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class Picture:
    """One training picture: its file, how often crops are taken from it, its licence and its source."""

    file: str
    weight: float
    licence: str
    source: str

    @property
    def name(self) -> str:
        return Path(self.file).stem


# Colour photographs have the largest weights, because the two test pictures consist of faces, cloth and metal. Grey
# textures teach fine detail; they are tinted at random (see `Crops`).
TRAINING = (
    Picture("china.jpg", 5.0, "CC BY 2.0", "danielbuechele, flickr.com/photos/danielbuechele/6061409035"),
    Picture("coffee.png", 5.0, "CC0", "Rachel Michetti, courtesy of Pikolo Espresso Bar"),
    Picture("flower.jpg", 2.0, "CC BY 2.0", "vultilion, flickr.com/photos/vultilion/6056698931"),
    Picture("rocket.jpg", 2.0, "public domain", "SpaceX Photos, flickr.com/photos/spacexphotos/16511594820"),
    Picture("ihc.png", 1.5, "no known copyright restrictions", "Center for Microscopy and Molecular Imaging"),
    Picture("hubble_deep_field.jpg", 1.0, "public domain", "NASA, ESA: Hubble eXtreme Deep Field"),
    Picture("retina.jpg", 1.0, "CC0", "Mikael Häggström, Wikimedia Commons"),
    Picture("camera.png", 3.0, "CC0", "Lav Varshney"),
    Picture("coins.png", 1.0, "no known copyright restrictions", "Brooklyn Museum Collection"),
    Picture("brick.png", 0.5, "CC0", "CC0Textures, Bricks25"),
    Picture("grass.png", 0.5, "CC0", "linolafett, DeviantArt: Grass-01"),
    Picture("gravel.png", 0.5, "CC0", "CC0Textures, Gravel04"),
    Picture("text.png", 0.5, "public domain", "Wikipedia: Corner.png"),
    Picture("clock_motion.png", 0.5, "public domain", "Stefan van der Walt"),
)
# The scales at which training pictures are seen. A smaller scale is sharper: a photograph at half its size has twice
# the detail per pixel. 1.6 is among them because small pictures are often enlarged to be decoded.
SCALES = (1.6, 1.0, 0.8, 0.6, 0.45)
HELD_OUT = ("astronaut", "chelsea")


def folders() -> tuple[Path, ...]:
    """Return the folders in which the two packages keep their pictures."""
    import skimage
    import sklearn

    return Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images"


def open_picture(file: str) -> Image.Image:
    """Open a picture of either package, as RGB."""
    for folder in folders():
        if (folder / file).is_file():
            return Image.open(folder / file).convert("RGB")
    raise FileNotFoundError(f"{file} is in neither of {', '.join(map(str, folders()))}")


def held_out(name: str, size: int = 512) -> np.ndarray:
    """Return a test picture as (size, size, 3) uint8: its centred square, resized (Lanczos) unless it fits already."""
    picture = open_picture(f"{name}.png")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    if side != size:
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """Turn an (H, W, 3) uint8 picture into (1, 3, H, W) float32 in [-1, 1], as diffusers' VAE wants it."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_pixels(image: torch.Tensor) -> np.ndarray:
    """Turn (1, 3, H, W) in about [-1, 1] into an (H, W, 3) uint8 picture, rounded and clamped as diffusers does."""
    return ((image[0].float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 pictures in dB, over all pixels and RGB, for a peak of 255."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


class Crops:
    """Makes random training crops, which depend only on the seed and the step, so a resumed run sees the same ones."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.images: list[list[np.ndarray]] = []
        for picture in TRAINING:
            full = open_picture(picture.file)
            if max(full.size) > 1200:  # the retina, which is so soft that nothing is lost at half its size
                full = full.resize((full.width // 2, full.height // 2), Image.Resampling.LANCZOS)
            sizes = [(round(full.width * s), round(full.height * s)) for s in SCALES]
            self.images.append([np.asarray(full.resize(size, Image.Resampling.LANCZOS)) for size in sizes])
        weights = np.array([picture.weight for picture in TRAINING])
        self.probabilities = weights / weights.sum()

    def batch(self, step: int, count: int, size: int) -> torch.Tensor:
        """Return the crops of a step, (count, 3, size, size) float32 in [-1, 1]."""
        rng = np.random.default_rng((self.seed, step))
        return torch.from_numpy(np.stack([self._crop(rng, size) for _ in range(count)]))

    def _crop(self, rng: np.random.Generator, size: int) -> np.ndarray:
        index = rng.choice(len(self.images), p=self.probabilities)
        fitting = [image for image in self.images[index] if min(image.shape[:2]) >= size]
        image = fitting[rng.integers(len(fitting))] if fitting else self.images[index][0]
        if not fitting:  # the picture is smaller than the crop even when enlarged, so it is mirrored outwards
            pad = [(0, max(0, size - n)) for n in image.shape[:2]]
            image = np.pad(image, [*pad, (0, 0)], mode="symmetric")
        y, x = (rng.integers(n - size + 1) for n in image.shape[:2])
        crop = image[y : y + size, x : x + size].astype(np.float32) / 127.5 - 1
        if rng.random() < 0.5:
            crop = crop.transpose(1, 0, 2)
        crop = np.rot90(crop, rng.integers(4))
        return np.ascontiguousarray(self._recolour(rng, crop).transpose(2, 0, 1))

    @staticmethod
    def _recolour(rng: np.random.Generator, crop: np.ndarray) -> np.ndarray:
        """Change gain, offset and colours at random, because fourteen pictures hold few of the colours there are."""
        if np.ptp(crop, axis=2).max() < 0.02 and rng.random() < 0.7:  # a grey crop becomes a random duotone
            dark, light = rng.uniform(-1, 0.3, 3), rng.uniform(-0.3, 1, 3)
            crop = dark + (crop * 0.5 + 0.5) * (light - dark)
        elif rng.random() < 0.25:
            crop = crop[:, :, rng.permutation(3)]
        if rng.random() < 0.6:
            mix = np.eye(3) * rng.uniform(0.7, 1.3) + rng.normal(0, 0.08, (3, 3))
            crop = crop @ mix + rng.normal(0, 0.12, 3)
        return np.clip(crop, -1, 1).astype(np.float32)
