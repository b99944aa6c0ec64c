"""One sample as bytes: safetensors holding PNG, FLAC, boxes, classes and JSON. Nothing is ever unpickled."""

import io
import json

import numpy as np
import soundfile
from PIL import Image
from safetensors.numpy import load, save

from opt_jax.data.spoken_scenes.speech import SAMPLE_RATE
from opt_jax.data.triplet import Triplet

_TEXT_FIELDS = ("id", "caption", "references", "labels", "named", "speaker")


def encode(sample: Triplet) -> bytes:
    """Serialises a complete sample; the picture is lossless, the sound rounded to 16 bits."""
    text = {field: getattr(sample, field) for field in _TEXT_FIELDS}
    png = io.BytesIO()
    Image.fromarray(sample.image).save(png, "PNG", compress_level=1)
    flac = io.BytesIO()
    integers = np.rint(sample.audio * 32767.0).astype(np.int16)
    soundfile.write(flac, integers, SAMPLE_RATE, format="FLAC", subtype="PCM_16", compression_level=0.3)
    return save(
        {
            "image": np.frombuffer(png.getvalue(), np.uint8),
            "audio": np.frombuffer(flac.getvalue(), np.uint8),
            "text": np.frombuffer(json.dumps(text).encode(), np.uint8),
            "boxes": sample.boxes,
            "classes": sample.classes,
        }
    )


def decode(record: bytes, image: bool = True, audio: bool = True) -> Triplet:
    """The inverse of `encode`; picture and sound are None where not asked for, and then not decoded."""
    tensors = load(record)
    text = json.loads(tensors["text"].tobytes())
    pixels = waveform = None
    if image:
        pixels = np.asarray(Image.open(io.BytesIO(tensors["image"].tobytes())))
    if audio:
        waveform, _ = soundfile.read(io.BytesIO(tensors["audio"].tobytes()), dtype="float32")
    return Triplet(
        id=text["id"],
        image=pixels,
        caption=text["caption"],
        audio=waveform,
        references=tuple(text["references"]),
        labels=tuple(text["labels"]),
        boxes=tensors["boxes"],
        classes=tensors["classes"],
        named=tuple(text["named"]),
        speaker=text["speaker"],
    )
