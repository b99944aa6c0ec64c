"""The feature cache: what the frozen encoders say about every triplet, written once and read many times.

A cache is a directory that holds one split:

    opt-train.array_record-00000-of-00018 ...   one ArrayRecord file a shard, as TensorFlow Datasets
                                                names them
    dataset_info.json, features.json            what `tfds.builder_from_directory` needs
    rows.npz                                    per row: id, lengths, presence, key of the caption, checksum
    statistics.npz                              mean and deviation of region features and audio frames
    quarantine.jsonl                            the rows left out: row, id, source, stage, reason
    manifest.json                               counts, hashes, and the fingerprint of what made it

`build_cache`, or `python -m opt_jax.cache.build`, makes it shard by shard, in one process, in several, or on
Apache Beam, and goes on where it was killed. `FeatureCache` reads it at random and refuses one that something
else made. `python -m opt_jax.cache.verify DIRECTORY` re-reads every byte. TensorFlow is not needed.
"""

from opt_jax.cache.builder import build_cache
from opt_jax.cache.manifest import CacheError, FingerprintMismatch, Manifest
from opt_jax.cache.reader import FeatureCache
from opt_jax.cache.schema import Quarantine, Schema

__all__ = [
    "CacheError",
    "FeatureCache",
    "FingerprintMismatch",
    "Manifest",
    "Quarantine",
    "Schema",
    "build_cache",
]
