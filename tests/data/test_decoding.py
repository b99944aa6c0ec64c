"""Pictures and recordings as people have them: odd, broken and too large."""

import io

import numpy as np
import pytest
import soundfile
from PIL import Image

from opt_jax.data.decoding import (
    UnusableSampleError,
    check_audio,
    check_caption,
    check_image,
    decode_audio,
    decode_image,
)


def file_of(image: Image.Image, kind="PNG", **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def sound(samples, rate, kind="WAV", **options) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, samples, rate, format=kind, **options)
    return content.getvalue()


def test_palettes_grey_and_transparency_become_rgb():
    colours = np.array([[[200, 10, 30], [0, 90, 255]]], np.uint8).repeat(8, 0).repeat(8, 1)
    palette = Image.fromarray(colours).quantize(4)
    assert palette.mode == "P"
    np.testing.assert_array_equal(decode_image(file_of(palette), "a"), np.asarray(palette.convert("RGB")))
    grey = Image.fromarray(np.full((9, 8), 77, np.uint8))
    np.testing.assert_array_equal(decode_image(file_of(grey), "a"), np.full((9, 8, 3), 77))
    clear = Image.fromarray(np.zeros((8, 8, 4), np.uint8))
    assert (decode_image(file_of(clear), "a") == 255).all()
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    np.testing.assert_array_equal(decode_image(file_of(Image.fromarray(ramp)), "a")[..., 0], ramp // 256)


def test_a_picture_is_turned_as_its_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    content = file_of(Image.fromarray(np.zeros((10, 20, 3), np.uint8)), "JPEG", exif=exif)
    assert decode_image(content, "a").shape == (20, 10, 3)


@pytest.mark.parametrize(
    "content, reason",
    [
        (file_of(Image.new("RGB", (1, 1))), "has 1 x 1 pixels; a side needs at least 8"),
        (file_of(Image.new("1", (10_000, 5_000))), "50 million of at most 40"),
        (file_of(Image.new("RGB", (90, 90)))[:80], "cannot be decoded"),
        (b"<html>not found</html>", "cannot be decoded: cannot identify"),
        (b"", "cannot be decoded"),
        (file_of(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "is of mode F"),
    ],
)
def test_pictures_that_are_refused(content, reason):
    with pytest.raises(UnusableSampleError, match=f"sample 'x/7': image .*{reason}"):
        decode_image(content, "x/7")


def test_sound_of_any_rate_and_channels():
    time = np.arange(44_100) / 44_100
    tone = np.sin(2 * np.pi * 440 * time)
    found = decode_audio(sound(np.stack([tone, 0 * tone], 1), 44_100, "FLAC"), "a")
    assert found.dtype == np.float32 and found.shape == (16_000,)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    np.testing.assert_allclose(found[500:-500], expected[500:-500], atol=2e-3)
    assert decode_audio(sound(tone, 44_100, "OGG"), "a").shape == (16_000,)


@pytest.mark.parametrize(
    "content, reason",
    [
        (sound(np.zeros(0), 16_000), "has 0 samples"),
        (
            sound(np.array([0.0, np.nan] * 500), 16_000, subtype="FLOAT"),
            "has 500 samples that are not finite",
        ),
        (sound(np.zeros(1000), 16_000, "FLAC")[:20], "cannot be decoded"),
        (sound(np.zeros(4000), 1), "is 4000 s long, at most 3600"),
        (sound(np.zeros(400), 1_000_000_007), "has 1000000007 samples a second"),
        (sound(np.full(400, 1e30), 16_000, subtype="FLOAT"), "has samples up to 1e.30"),
    ],
)
def test_recordings_that_are_refused(content, reason):
    with pytest.raises(UnusableSampleError, match=f"sample 'x/7': audio {reason}"):
        decode_audio(content, "x/7")


def test_arrays_of_another_kind_are_refused():
    with pytest.raises(UnusableSampleError, match=r"image is float64 \[8, 8, 3\], expected uint8"):
        check_image(np.zeros((8, 8, 3)), "a")
    with pytest.raises(UnusableSampleError, match=r"audio is float32 \[2, 9\], expected float32 \[samples\]"):
        check_audio(np.zeros((2, 9), np.float32), "a")
    with pytest.raises(UnusableSampleError, match=r"audio is list, expected float32"):
        check_audio([0.0], "a")
    with pytest.raises(UnusableSampleError, match=r"caption is bytes, expected text"):
        check_caption(b"a ball", "a")
    with pytest.raises(UnusableSampleError, match=r"caption is no valid Unicode"):
        check_caption("a \ud800 ball", "a")
    with pytest.raises(UnusableSampleError, match=r"has 368 samples \(23 ms\); one frame needs 400"):
        check_audio(np.zeros(368, np.float32), "a", shortest=400)
