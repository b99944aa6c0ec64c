"""The frozen encoders by their directories: an extractor that is small as a pickle."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from opt_jax.cache.extractor import FeatureExtractor
from opt_jax.cache.schema import Schema
from opt_jax.encoders.frozen import digest, load_frozen
from opt_jax.encoders.tokenizer import Tokenizer
from opt_jax.encoders.wav2vec2_extraction import CONTEXT_SECONDS, WINDOW_SECONDS

EXTRACTION_VERSION = 2
"""To be raised with every change of the code that changes features: older caches are refused then."""


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What decides the features of a triplet, and the extractor for `build_cache` that goes with it.

    The encoders are loaded by the process that extracts, when it first does: nothing is where all shards are
    there already, and each worker process has its own.

    Attributes:
      detector: directory of a frozen encoder, as `speech` and `pictures`; None: cells of a grid are regions.
      speech, pictures: None: no triplet may have sound, or pixels.
      max_seconds: longer recordings are cut.
      feature_dtype: 'float16' or 'bfloat16'.
      ready: (width, classes) of the regions that every picture comes with; None: they are made here.
      grid_window: side of the square of cells that make a grid's region, odd.
    """

    detector: Path | None
    speech: Path | None
    pictures: Path | None
    tokenizer: Tokenizer
    max_seconds: float
    feature_dtype: str = "float16"
    ready: tuple[int, int] | None = None
    grid_window: int = 1

    def extract(self, triplets: Sequence) -> list:
        """As `FeatureExtractor.extract`."""
        return self._extractor.extract(triplets)

    def schema(self) -> Schema:
        """Sizes of what is extracted. Raises FrozenEncoderError."""
        return FeatureExtractor(*self._loaded(), *self._options).schema(self.feature_dtype)

    def fingerprint(self, source) -> dict[str, Any]:
        """What a cache of `source` is made of. Raises FrozenEncoderError."""
        return {"source": source.fingerprint(), "extractor": self._fingerprint} | {
            "dtype": self.feature_dtype,
            "code_version": EXTRACTION_VERSION,
        }

    @functools.cached_property
    def _fingerprint(self) -> dict[str, Any]:
        """What decides the features."""
        regions = list(self.ready) if self.ready else "grid"
        window = {} if self.detector or self.ready else {"grid_window": self.grid_window}
        return window | {
            "detector": digest(self.detector) if self.detector else regions,
            "wav2vec2": digest(self.speech) if self.speech else "none",
            "dvae": digest(self.pictures) if self.pictures else "none",
            "tokenizer": self.tokenizer.digest(),
            "max_seconds": self.max_seconds,
            "windows": [WINDOW_SECONDS, CONTEXT_SECONDS],
        }

    @functools.cached_property
    def _extractor(self) -> FeatureExtractor:
        encoders = [some and (jax.device_put(some[0]), some[1]) for some in self._loaded()]
        return FeatureExtractor(*encoders, *self._options)

    def _loaded(self) -> list[tuple[dict, dict] | None]:
        return [path and load_frozen(path) for path in (self.detector, self.speech, self.pictures)]

    @property
    def _options(self) -> tuple:
        return self.tokenizer, self.max_seconds, self.ready, self.grid_window

    def __reduce__(self):  # what was loaded stays here
        return Extraction, tuple(getattr(self, field.name) for field in dataclasses.fields(self))
