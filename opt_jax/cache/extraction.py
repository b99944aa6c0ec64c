"""The frozen encoders by their directories: an extractor that is small as a pickle."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opt_jax.cache.extractor import FeatureExtractor
from opt_jax.cache.schema import Schema
from opt_jax.encoders.frozen import load_frozen
from opt_jax.encoders.tokenizer import Tokenizer

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
    """

    detector: Path | None
    speech: Path | None
    pictures: Path | None
    tokenizer: Tokenizer
    max_seconds: float
    feature_dtype: str = "float16"
    ready: tuple[int, int] | None = None

    def extract(self, triplets: Sequence) -> list:
        """As `FeatureExtractor.extract`."""
        return self._extractor.extract(triplets)

    def schema(self) -> Schema:
        """Sizes of what is extracted. Raises FrozenEncoderError."""
        paths = (self.detector, self.speech, self.pictures)
        encoders = [path and load_frozen(path) for path in paths]
        extractor = FeatureExtractor(*encoders, self.tokenizer, self.max_seconds, self.ready)
        return extractor.schema(self.feature_dtype)

    def fingerprint(self, source) -> dict[str, Any]:
        """What a cache of `source` is made of. Raises FrozenEncoderError."""
        return {"source": source.fingerprint(), "extractor": self._fingerprint} | {
            "dtype": self.feature_dtype,
            "code_version": EXTRACTION_VERSION,
        }

    @functools.cached_property
    def _extractor(self) -> FeatureExtractor:
        return FeatureExtractor.from_directories(*self._arguments)

    @functools.cached_property
    def _fingerprint(self) -> dict[str, Any]:
        return FeatureExtractor.fingerprint(*self._arguments)

    @property
    def _arguments(self) -> tuple:
        return self.detector, self.speech, self.pictures, self.tokenizer, self.max_seconds, self.ready

    def __reduce__(self):
        return Extraction, (*self._arguments[:-1], self.feature_dtype, self.ready)
