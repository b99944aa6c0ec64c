"""The frozen encoders together: from triplets to the arrays of the cache."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from opt_jax.cache.schema import Quarantine, Schema
from opt_jax.data.triplet import Triplet
from opt_jax.encoders import dvae, faster_rcnn, wav2vec2
from opt_jax.encoders.dvae_pictures import fit_square
from opt_jax.encoders.frozen import digest, load_frozen
from opt_jax.encoders.tokenizer import Tokenizer
from opt_jax.encoders.wav2vec2_batches import SAMPLE_RATE

CHUNK = (
    50  # rows to a compiled call: every chunk is filled up to it, so that each encoder compiles few shapes
)


@dataclasses.dataclass(frozen=True)
class Extractor:
    """`extract(triplets)` for `opt_jax.cache.build_cache`. Each argument is (params, config) as `load_frozen`
    gives them."""

    detector: tuple[dict, dict]
    speech: tuple[dict, dict]
    pictures: tuple[dict, dict]
    tokenizer: Tokenizer
    max_seconds: float

    @classmethod
    def from_directories(
        cls, detector: Path, speech: Path, pictures: Path, tokenizer: Tokenizer, max_seconds: float
    ):
        """Loads the encoders frozen in three directories."""
        loaded = [load_frozen(directory) for directory in (detector, speech, pictures)]
        return cls(*loaded, tokenizer, max_seconds)

    @staticmethod
    def fingerprint(
        detector: Path, speech: Path, pictures: Path, tokenizer: Tokenizer, max_seconds: float
    ) -> dict:
        """What decides the features, for the cache's fingerprint."""
        return {
            "detector": digest(detector),
            "wav2vec2": digest(speech),
            "dvae": digest(pictures),
            "tokenizer": tokenizer.digest(),
            "max_seconds": max_seconds,
        }

    def schema(self, codes_per_image: int, feature_dtype: str) -> Schema:
        """Sizes of what this extractor writes."""
        model = faster_rcnn.from_config(self.detector[1])
        return Schema(
            region_size=model.feature_size,
            region_classes=self.detector[1]["num_classes"] + 1,
            audio_size=wav2vec2.feature_size(self.speech[1]),
            num_codes=codes_per_image,
            cls_id=self.tokenizer.cls_id,
            feature_dtype=feature_dtype,
        )

    def extract(self, triplets: Sequence[Triplet]) -> list[Mapping | Quarantine]:
        """The arrays of `opt_jax.cache.schema.FIELDS` for each triplet, in order; a clip without a frame is
        set aside."""
        results: list = [{} for _ in triplets]
        for row, triplet in enumerate(triplets):
            if triplet.caption:
                results[row]["text_ids"] = np.asarray(self.tokenizer.encode(triplet.caption), np.int32)
        with_image = [row for row, triplet in enumerate(triplets) if triplet.image is not None]
        for shape in sorted({triplets[row].image.shape for row in with_image}):
            same = [row for row in with_image if triplets[row].image.shape == shape]
            for start in range(0, len(same), CHUNK):
                self._images(triplets, same[start : start + CHUNK], results)
        with_audio = [row for row, triplet in enumerate(triplets) if triplet.audio is not None]
        with_audio.sort(key=lambda row: len(triplets[row].audio))
        for start in range(0, len(with_audio), CHUNK):
            self._audio(triplets, with_audio[start : start + CHUNK], results)
        return results

    def _images(self, triplets, rows, results):
        images = filled(np.stack([triplets[row].image for row in rows]))
        regions = {
            name: np.asarray(x)
            for name, x in faster_rcnn.detect(self.detector[0], images, self.detector[1]).items()
        }
        size = self.pictures[1]["image_size"]
        codes = dvae.encode(self.pictures[0], np.stack([fit_square(image, size) for image in images]))
        height, width = images.shape[1:3]
        for position, row in enumerate(rows):
            valid = regions["valid"][position]
            results[row] |= {
                "region_features": regions["features"][position][valid],
                "region_boxes": relative_boxes(regions["boxes"][position][valid], height, width),
                "region_classes": regions["classes"][position][valid],
                "region_scores": regions["scores"][position][valid],
                "image_codes": codes[position],
            }

    def _audio(self, triplets, rows, results):
        longest = int(self.max_seconds * SAMPLE_RATE)
        clips = [triplets[row].audio[:longest] for row in rows]
        lengths = np.array([len(clip) for clip in clips], np.int32)
        waveforms = np.zeros((len(rows), lengths.max()), np.float32)
        for position, clip in enumerate(clips):
            waveforms[position, : len(clip)] = clip
        encoder = wav2vec2.Extractor(*self.speech)
        features, counts = encoder.extract(filled(waveforms), filled(lengths))
        features, counts = np.asarray(features), np.asarray(counts)
        for position, row in enumerate(rows):
            if counts[position] < 1:
                results[row] = Quarantine(f"{lengths[position]} samples of audio are too few for one frame")
            elif not isinstance(results[row], Quarantine):
                results[row]["audio_features"] = features[position, : counts[position]]


def filled(rows: np.ndarray) -> np.ndarray:
    """Rows [n, ...] with the last one repeated up to CHUNK."""
    return np.concatenate([rows, np.repeat(rows[-1:], CHUNK - len(rows), axis=0)])


def relative_boxes(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Boxes [R, 4] in pixels to [R, 7]: x1, y1, x2, y2, w, h, w*h, all relative to the picture (UNITER)."""
    x1, y1, x2, y2 = (boxes / np.array([width, height, width, height], np.float32)).T
    return np.stack([x1, y1, x2, y2, x2 - x1, y2 - y1, (x2 - x1) * (y2 - y1)], axis=1).astype(np.float32)
