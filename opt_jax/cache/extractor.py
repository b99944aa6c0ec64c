"""The frozen encoders together: from triplets to the arrays of the cache."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from opt_jax.cache.schema import Quarantine, Schema
from opt_jax.data.decoding import UnusableSampleError, check_audio, check_caption, check_image
from opt_jax.data.triplet import Regions, Triplet
from opt_jax.encoders import dvae, faster_rcnn, faster_rcnn_pictures, grid
from opt_jax.encoders.dvae_pictures import fit_square
from opt_jax.encoders.frozen import check_kind
from opt_jax.encoders.tokenizer import Tokenizer
from opt_jax.encoders.wav2vec2 import SAMPLE_RATE, frame_count, receptive_field
from opt_jax.encoders.wav2vec2_extraction import Extractor, feature_size

# Rows to a compiled call at most; every call is filled up, so that each encoder compiles few shapes.
CHUNK = 50
MEMORY = 512 << 20  # bytes of the largest array of a call
CANVAS = 128  # pixels: sides of the canvases that pictures lie in are multiples of this
THINNEST = 16  # pixels of a resized picture's shorter side


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
    """`extract(triplets)` for `opt_jax.cache.build_cache`.

    Encoders are (params, config) as `load_frozen` gives them. Without a detector the cells of the dVAE's last
    map stand as regions, or, with `ready` (width of the features, number of classes), every picture has to
    come with regions. Without a speech encoder no triplet may have speech, without a dVAE none pixels.
    """

    detector: tuple[dict, dict] | None
    speech: tuple[dict, dict] | None
    pictures: tuple[dict, dict] | None
    tokenizer: Tokenizer
    max_seconds: float
    ready: tuple[int, int] | None = None
    grid_window: int = 1

    def __post_init__(self):
        encoders = (self.detector, self.speech, self.pictures)
        for name, encoder in zip(("detector", "wav2vec2", "dvae"), encoders, strict=True):
            if encoder:
                check_kind(name, encoder[1])
        shortest = receptive_field(self._speech_config) / SAMPLE_RATE if self.speech else 0
        if self.max_seconds < shortest:
            raise ValueError(f"max_seconds is {self.max_seconds:g}; one audio frame needs {shortest:g} s")

    def schema(self, feature_dtype: str) -> Schema:
        """Sizes of what this extractor writes; without an encoder 1 stands for its width or length."""
        if self.detector:
            region_size = faster_rcnn.from_config(self.detector[1]).feature_size
            region_classes = self.detector[1]["num_classes"] + 1
        elif self.ready:
            region_size, region_classes = self.ready[0], self.ready[1] + 1
        else:  # cells, all of one class; or no picture at all
            cells = self.pictures and grid.feature_size(self.pictures[0], self.grid_window)
            region_size, region_classes = cells or 1, 2
        return Schema(
            region_size=region_size,
            region_classes=region_classes,
            audio_size=feature_size(self.speech[1]) if self.speech else 1,
            num_codes=math.prod(self.pictures[1]["code_grid"]) if self.pictures else 1,
            cls_id=self.tokenizer.cls_id,
            feature_dtype=feature_dtype,
        )

    def extract(self, triplets: Sequence[Triplet]) -> list[Mapping | Quarantine]:
        """The arrays of `opt_jax.cache.schema.FIELDS` for each triplet, in order.

        A triplet with a picture or clip that nothing can be made of is set aside, with the reason.
        """
        results: list = [self._judged(triplet) for triplet in triplets]
        usable = [row for row, result in enumerate(results) if not isinstance(result, Quarantine)]
        pictures = [row for row in usable if triplets[row].image is not None]
        self._codes(triplets, pictures, results)
        regions = [row for row in usable if triplets[row].regions is not None]
        for row in regions:
            results[row] = {"image_codes": np.zeros(0, np.int32)} | results[row]
            results[row] |= ready_regions(triplets[row].regions)
        self._regions(triplets, sorted(set(pictures) - set(regions)), results)
        self._audio(triplets, [row for row in usable if triplets[row].audio is not None], results)
        return results

    def _judged(self, triplet: Triplet) -> dict | Quarantine:
        """The words of a triplet whose parts can all be used, else why not."""
        try:
            if triplet.image is not None:
                if not self.pictures:
                    raise UnusableSampleError(triplet.id, "image", "is there, but no discrete VAE for it")
                check_image(triplet.image, triplet.id)
                self._check_width(triplet)
                if self.ready and triplet.regions is None:
                    raise UnusableSampleError(triplet.id, "image", "comes without ready regions")
            if triplet.regions is not None:
                self._check_regions(triplet)
            if triplet.audio is not None and not self.speech:
                raise UnusableSampleError(triplet.id, "audio", "is there, but no speech encoder for it")
            if triplet.audio is not None:
                check_audio(triplet.audio, triplet.id, receptive_field(self._speech_config))
            if not triplet.caption:
                return {}
            check_caption(triplet.caption, triplet.id)
        except UnusableSampleError as error:
            return Quarantine(str(error))
        return {"text_ids": np.asarray(self.tokenizer.encode(triplet.caption), np.int32)}

    def _check_width(self, triplet: Triplet) -> None:
        if not self.detector:
            return
        model, shape = self.detector[1], triplet.image.shape
        thinner = min(shape[:2]) * faster_rcnn_pictures.scale(shape, model["min_side"], model["max_side"])
        if thinner < THINNEST:
            raise UnusableSampleError(
                triplet.id,
                "image",
                f"has {shape[1]} x {shape[0]} pixels: too thin, {thinner:.0f} pixels of at least {THINNEST}"
                " once it is resized",
            )

    def _check_regions(self, triplet: Triplet) -> None:
        """Ready features have to be those of the detector that the others come from."""
        schema, regions = self.schema("float16"), triplet.regions
        if regions.features.shape[1] != schema.region_size:
            found, wanted = regions.features.shape[1], schema.region_size
            raise UnusableSampleError(triplet.id, "regions", f"are {found} wide, expected {wanted}")
        if regions.classes.max(initial=1) >= schema.region_classes:
            raise UnusableSampleError(
                triplet.id,
                "regions",
                f"have classes up to {regions.classes.max()}, expected at most {schema.region_classes - 1}",
            )

    @property
    def _speech_config(self) -> ConfigDict:
        return ConfigDict(self.speech[1])

    def _codes(self, triplets, rows, results):
        if rows:
            size = self.pictures[1]["image_size"]
            squares = np.stack([fit_square(triplets[row].image, size) for row in rows])
            for row, codes in zip(rows, dvae.encode(self.pictures[0], squares), strict=True):
                results[row]["image_codes"] = codes

    def _regions(self, triplets, rows, results):
        """Pictures of one canvas go through the detector together."""
        if not rows:
            return
        if not self.detector:
            images = [triplets[row].image for row in rows]
            size = self.pictures[1]["image_size"]
            cells = grid.grid_regions(self.pictures[0], images, size, self.grid_window)
            for row, found in zip(rows, cells, strict=True):
                results[row] |= found
            return
        model, resized = self.detector[1], {}
        by_canvas = collections.defaultdict(list)
        for row in rows:
            resized[row], _ = faster_rcnn_pictures.resized(
                triplets[row].image, model["min_side"], model["max_side"]
            )
            by_canvas[tuple(-(-side // CANVAS) * CANVAS for side in resized[row].shape[:2])].append(row)
        for canvas, same in sorted(by_canvas.items()):
            # The stem's output before and after its norm, and the overlaps of the proposals.
            overlaps = 4 * model["proposals_before_nms"] ** 2
            count = together(max(2 * canvas[0] * canvas[1] * model["width"], overlaps))
            for part in (same[start : start + count] for start in range(0, len(same), count)):
                images = np.stack([faster_rcnn_pictures.in_corner(resized[row], *canvas) for row in part])
                sizes = np.array([resized[row].shape[:2] for row in part])
                found = faster_rcnn.detect(
                    self.detector[0], filled(images, count), model, filled(sizes, count)
                )
                regions = {name: np.asarray(x) for name, x in found.items()}
                for position, row in enumerate(part):
                    valid = regions["valid"][position]
                    results[row] |= {
                        "region_features": regions["features"][position][valid],
                        "region_boxes": relative_boxes(regions["boxes"][position][valid], *sizes[position]),
                        "region_classes": regions["classes"][position][valid],
                        "region_scores": regions["scores"][position][valid],
                    }

    def _audio(self, triplets, rows, results):
        """Clips of similar length go through together, those of several windows alone."""
        if not rows:
            return
        clips = {row: triplets[row].audio[: int(self.max_seconds * SAMPLE_RATE)] for row in rows}
        config, encoder = self._speech_config, Extractor(*self.speech)
        rows = sorted(rows, key=lambda row: len(clips[row]))
        while rows:
            count = CHUNK
            while True:
                longest = len(clips[rows[:count][-1]])
                # The first convolution's output, the largest.
                one = longest // config.conv_stride[0] * config.conv_dim[0] * 4
                fits = 1 if frame_count(longest, config) > encoder.window else together(one)
                if count <= fits:
                    break
                count //= 2
            part, rows = rows[:count], rows[count:]
            lengths = np.array([len(clips[row]) for row in part], np.int32)
            waveforms = np.zeros((len(part), lengths.max()), np.float32)
            for position, row in enumerate(part):
                waveforms[position, : lengths[position]] = clips[row]
            features, counts = encoder.extract(filled(waveforms, count), filled(lengths, count))
            features, counts = np.asarray(features), np.asarray(counts)
            for position, row in enumerate(part):
                results[row]["audio_features"] = features[position, : counts[position]]


def together(size: int) -> int:
    """How many rows go through in one call whose largest array has `size` bytes a row: CHUNK, or that halved
    until MEMORY is enough; so few different numbers, each of which is a shape to compile."""
    count = CHUNK
    while count > 1 and count * size > MEMORY:
        count //= 2
    return count


def filled(rows: np.ndarray, count: int) -> np.ndarray:
    """Rows [n, ...] with the last one repeated up to `count`."""
    return np.concatenate([rows, np.repeat(rows[-1:], count - len(rows), axis=0)])


def ready_regions(regions: Regions) -> dict[str, np.ndarray]:
    """The region fields of the cache from what a detector elsewhere found."""
    return {
        "region_features": regions.features,
        "region_boxes": relative_boxes(regions.boxes, regions.height, regions.width),
        "region_classes": regions.classes,
        "region_scores": regions.scores,
    }


def relative_boxes(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Boxes [R, 4] in pixels to [R, 7]: x1, y1, x2, y2, w, h, w*h, all relative to the picture (UNITER)."""
    x1, y1, x2, y2 = (boxes / np.array([width, height, width, height], np.float32)).T
    return np.stack([x1, y1, x2, y2, x2 - x1, y2 - y1, (x2 - x1) * (y2 - y1)], axis=1).astype(np.float32)
