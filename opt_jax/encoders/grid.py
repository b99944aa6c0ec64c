"""Regions without a detector: the cells of the frozen discrete VAE's last map stand as regions."""

from collections.abc import Sequence

import numpy as np

from opt_jax.encoders import dvae
from opt_jax.encoders.dvae_pictures import fit_square, placed


def feature_size(params, window: int) -> int:
    """Width of a cell's feature."""
    return window**2 * params["encoder"]["output"]["kernel"].shape[-2]


def grid_regions(params, images: Sequence[np.ndarray], size: int, window: int) -> list[dict[str, np.ndarray]]:
    """The cells of pictures (uint8 [h, w, 3] each), row by row.

    A picture is fitted into a square of `size` pixels; cells that show nothing but the bars beside it are
    left out. A feature is those of the window x window cells around, row by row, zeros beyond the square:
    what matters in a picture seldom lies within one cell. Returns for each the region fields of
    `opt_jax.cache.schema`: features, boxes (7 numbers, cut off at the picture's edges), classes and scores,
    which are all 1.
    """
    maps = dvae.features(params, np.stack([fit_square(image, size) for image in images]))
    rows, columns = maps.shape[1:3]
    margin = window // 2
    padded = np.pad(maps, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    around = [padded[:, y : y + rows, x : x + columns] for y in range(window) for x in range(window)]
    maps = np.concatenate(around, -1)
    cell = size / rows
    top, left = np.meshgrid(np.arange(rows) * cell, np.arange(columns) * cell, indexing="ij")
    corners = np.stack([left, top, left + cell, top + cell], -1).reshape(-1, 4)
    found = []
    for image, cells in zip(images, maps, strict=True):
        y, x, height, width = placed(image.shape, size)
        boxes = (corners - (x, y, x, y)) / (width, height, width, height)
        x1, y1, x2, y2 = np.clip(boxes, 0, 1).T
        seen = (x2 > x1) & (y2 > y1)
        boxes = np.stack([x1, y1, x2, y2, x2 - x1, y2 - y1, (x2 - x1) * (y2 - y1)], 1)[seen]
        found.append(
            {
                "region_features": cells.reshape(rows * columns, -1)[seen],
                "region_boxes": boxes.astype(np.float32),
                "region_classes": np.ones(len(boxes), np.int32),
                "region_scores": np.ones(len(boxes), np.float32),
            }
        )
    return found
