"""A source of tiny triplets and an extractor that counts, for the tests of the cache and of the loader."""

import numpy as np

from opt_jax.cache import Quarantine, Schema
from opt_jax.data.triplet import Triplet

SCHEMA = Schema(region_size=4, region_classes=5, audio_size=3, num_codes=4, cls_id=2)


class TinySource:
    """Row i has i % 3 + 1 words and (i % 4 + 1) * 10 samples; every fifth row lacks one modality."""

    class_names = ["circle", "square", "star"]

    def __init__(self, rows: int = 10, broken: tuple[int, ...] = ()):
        self.rows, self.broken = rows, broken

    def __len__(self):
        return self.rows

    def __getitem__(self, row):
        if row in self.broken:
            raise OSError("cannot decode")
        caption = " ".join(["red", "green", "blue"][: row % 3 + 1])
        return Triplet(
            id=f"tiny-{row:03d}",
            image=None if row % 10 == 4 else np.full((2, 2, 3), row, np.uint8),
            caption=None if row % 10 == 9 else caption,
            audio=None if row % 10 == 7 else np.full(10 * (row % 4 + 1), row, np.float32),
            references=(caption, "something red"),
            labels=(row % 3,),
        )


class TinyExtractor:
    """Features are numbers drawn with the row as seed. `rejected` rows come back as Quarantine.

    `before` is called with the number of the call (0, 1, ...) before extraction, to break a build.
    """

    def __init__(self, rejected: tuple[str, ...] = (), before=lambda call: None):
        self.rejected, self.before = rejected, before
        self.seen = []
        self.calls = 0

    def extract(self, triplets):
        self.before(self.calls)
        self.calls += 1
        self.seen += [triplet.id for triplet in triplets]
        return [self._one(triplet) for triplet in triplets]

    def _one(self, triplet):
        if triplet.id in self.rejected:
            return Quarantine("no region found")
        row = int(triplet.id[-3:])
        random = np.random.default_rng(row)
        arrays = {}
        if triplet.caption is not None:
            arrays["text_ids"] = [2, *range(10, 10 + len(triplet.caption.split())), 3]
        if triplet.image is not None:
            regions = row % 2 + 1
            arrays["region_features"] = random.normal(3, 2, (regions, 4)).astype(np.float32)
            arrays["region_boxes"] = random.uniform(size=(regions, 7)).astype(np.float32)
            arrays["region_classes"] = np.full(regions, row % 4 + 1)
            arrays["region_scores"] = np.full(regions, 0.5)
            arrays["image_codes"] = np.arange(4) + row
        if triplet.audio is not None:
            frames = len(triplet.audio) // 10 + 1
            arrays["audio_features"] = random.normal(-1, 0.5, (frames, 3)).astype(np.float32)
        return arrays
