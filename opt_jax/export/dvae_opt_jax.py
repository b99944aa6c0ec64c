"""The discrete variational autoencoder that turns pictures into codes and back ("Zero-Shot Text-to-Image
Generation", arXiv 2102.12092, section 2.1), and the cells of its last map as regions.

Letters: B pictures, H and W pixels, h and w cells, K codes in the codebook, G groups of blocks.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from .images_opt_jax import fit_square, placed, with_sides

PIXEL_MARGIN = 0.1  # keeps pixels off 0 and 1, where the logit-Laplace density has no logit (appendix A.3)
TOGETHER = 8  # pictures in one call


def convolution(inputs: int, outputs: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, width, padding=width // 2)


class Block(nn.Module):
    """id_path(x) + gain * four convolutions of kernel widths `widths` on x, each after a ReLU; with
    `upsample` height and width double after the first, which has to be 1 wide."""

    def __init__(self, inputs: int, outputs: int, widths: Sequence[int], gain: float, upsample=False):
        super().__init__()
        self.gain, self.upsample, hidden = gain, upsample, outputs // 4
        self.conv_1 = convolution(inputs, hidden, widths[0])
        self.conv_2 = convolution(hidden, hidden, widths[1])
        self.conv_3 = convolution(hidden, hidden, widths[2])
        self.conv_4 = convolution(hidden, outputs, widths[3])
        self.id_path = convolution(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def scaled(self, x: Tensor) -> Tensor:
        return functional.interpolate(x, scale_factor=2, mode="nearest") if self.upsample else x

    def forward(self, x: Tensor) -> Tensor:
        y = self.scaled(self.conv_1(x.relu()))
        y = self.conv_4(self.conv_3(self.conv_2(y.relu()).relu()).relu())
        return self.scaled(self.id_path(x)) + self.gain * y


class Part(nn.Module):
    """The encoder or the decoder: `input`, the blocks by name, `output`."""

    def __init__(self, config: dict, decodes: bool):
        super().__init__()
        groups, per_group, width = (config[name] for name in ("group_count", "n_blk_per_group", "n_hid"))
        gain, patch = 1 / (groups * per_group) ** 2, config["patch_size"] ** 2
        self.names: list[list[str]] = []  # of the blocks of each group
        if decodes:
            inputs, widths = config["n_init"], (1, 3, 3, 3)
            self.input = convolution(config["vocab_size"], inputs, 1)
        else:
            inputs, widths = width, (3, 3, 3, 1)
            self.input = convolution(3 * patch, inputs, config["input_width"])
        for group in range(groups):
            outputs, self.names = width * 2 ** (groups - 1 - group if decodes else group), [*self.names, []]
            for block in range(per_group):
                grows = decodes and group > 0 and block == 0
                self.names[-1].append(f"group_{group + 1}_block_{block + 1}")
                self.add_module(self.names[-1][-1], Block(inputs, outputs, widths, gain, grows))
                inputs = outputs
        self.output = convolution(inputs, 6 * patch if decodes else config["vocab_size"], 1)

    def forward(self, x: Tensor, shrink: bool) -> Tensor:
        """x through the input and the blocks, and ReLU; `shrink` takes maxima of 2 x 2 between groups."""
        x = self.input(x)
        for number, names in enumerate(self.names):
            x = functional.max_pool2d(x, 2) if shrink and number else x
            for name in names:
                x = self.get_submodule(name)(x)
        return x.relu()


class DiscreteVAE(nn.Module):
    """Pictures to codes and back. config: of the folder's config.json."""

    def __init__(self, config: dict):
        super().__init__()
        self.config, self.image_size = config, config["image_size"]
        self.encoder, self.decoder = Part(config, decodes=False), Part(config, decodes=True)

    @classmethod
    def from_folder(cls, folder: Path) -> "DiscreteVAE":
        """In evaluation mode, of a folder with config.json and model.safetensors."""
        module = cls(json.loads((folder / "config.json").read_text()))
        module.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
        return module.eval().requires_grad_(False)

    def pixels(self, images: np.ndarray) -> Tensor:
        """uint8 [B, H, W, 3] as the model takes it, [B, 3, H, W] from 0.1 to 0.9."""
        weight = self.encoder.input.weight
        x = torch.from_numpy(np.array(images)).to(weight.device, weight.dtype) / 255
        return ((1 - 2 * PIXEL_MARGIN) * x + PIXEL_MARGIN).permute(0, 3, 1, 2)

    def features(self, pixels: Tensor) -> Tensor:
        """The last map [B, n_hid 2^(G-1), h, w], at least 0, in which the logits of the codes are linear."""
        size = self.config["patch_size"]
        x = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 3, 5, 1, 2, 4).flatten(1, 3)
        return self.encoder(x, shrink=True)

    def logits(self, pixels: Tensor) -> Tensor:
        """[B, K, h, w]."""
        return self.encoder.output(self.features(pixels))

    def means(self, codes: Tensor) -> Tensor:
        """int [B, h, w] to the mean of the mapped pixels before its sigmoid, [B, 3, H, W]."""
        weight, size = self.decoder.input.weight, self.config["patch_size"]
        x = functional.one_hot(codes, self.config["vocab_size"]).permute(0, 3, 1, 2).to(weight.dtype)
        x = self.decoder.output(self.decoder(x, shrink=False))
        x = x.unflatten(1, (size, size, 6)).permute(0, 3, 4, 1, 5, 2)
        return x.flatten(4, 5).flatten(2, 3)[:, :3]

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] to the most probable code of each cell: int64 [B, h w], row by row."""
        return np.concatenate([self.logits(x).argmax(1).flatten(1).cpu() for x in self.parts(images)])

    @torch.no_grad()
    def decode(self, codes) -> np.ndarray:
        """int [B, h w] of square grids to pictures uint8 [B, H, W, 3]."""
        codes = torch.as_tensor(codes, device=self.encoder.input.weight.device).long()
        side, found = round(codes.shape[1] ** 0.5), []
        for part in codes.unflatten(1, (side, side)).split(TOGETHER):
            x = (self.means(part).sigmoid() - PIXEL_MARGIN) / (1 - 2 * PIXEL_MARGIN)
            found.append((x.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
        return np.concatenate(found)

    def parts(self, images: np.ndarray):
        for start in range(0, len(images), TOGETHER):
            yield self.pixels(images[start : start + TOGETHER])

    @torch.no_grad()
    def grid_regions(self, image: np.ndarray, window: int) -> tuple[Tensor, np.ndarray]:
        """The cells of a picture uint8 [H, W, 3] as regions: features [R, F], boxes float32 [R, 7].

        A feature is those of the window x window cells around, zeros beyond the square; cells that show
        nothing but the bars beside the picture are left out.
        """
        size, margin = self.image_size, window // 2
        (maps,) = self.features(self.pixels(fit_square(image, size)[None]))
        rows, columns = maps.shape[1:]
        maps = functional.pad(maps, (margin,) * 4)
        around = [maps[:, y : y + rows, x : x + columns] for y in range(window) for x in range(window)]
        features = torch.cat(around).flatten(1).T
        cell = size / rows
        top, left = np.meshgrid(np.arange(rows) * cell, np.arange(columns) * cell, indexing="ij")
        corners = np.stack([left, top, left + cell, top + cell], -1).reshape(-1, 4)
        y, x, height, width = placed(image.shape, size)
        corners = np.clip((corners - (x, y, x, y)) / (width, height, width, height), 0, 1)
        seen = (corners[:, 2:] > corners[:, :2]).all(1)
        return features[torch.from_numpy(seen).to(features.device)], with_sides(corners[seen])
