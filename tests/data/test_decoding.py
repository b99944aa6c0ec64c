"""Pictures and recordings as people have them: odd, broken and too large."""

import io
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from raw_files import BAD_PICTURES, BAD_SOUNDS, file_of, picture, rf64_header, sound, tone, wav_header

from opt_jax.data.decoding import check_audio, check_caption, check_image, decode_audio, decode_image
from opt_jax.data.triplet import UnusableSampleError

MEASURE = r"""
import pathlib, re, sys, time
from opt_jax.data.decoding import decode_audio, decode_image
from opt_jax.data.triplet import UnusableSampleError
def peak():  # KiB; what getrusage gives starts at the peak of the process that started this one
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    before, start, content = peak(), time.monotonic(), path.read_bytes()
    kind = path.name.split(".")[0]
    try:
        decode_audio(content, "a") if kind == "sound" else decode_image(content, "a", path.suffix)
    except UnusableSampleError:
        print(path.name, time.monotonic() - start, peak() - before >> 10)
"""


def test_bad_files_are_refused_quickly_and_in_little_memory(tmp_path):
    bad = {"picture": BAD_PICTURES, "sound": BAD_SOUNDS}
    for kind, files in bad.items():
        for name, (content, _) in files.items():
            (tmp_path / f"{kind}.{name}").write_bytes(content)
    found = subprocess.check_output([sys.executable, "-c", MEASURE, str(tmp_path)], text=True).splitlines()
    assert len(found) == len(BAD_PICTURES) + len(BAD_SOUNDS)
    for name, seconds, grown in map(str.split, found):
        assert float(seconds) < 5 and int(grown) < 100, (name, seconds, grown)


def test_grey_and_transparency_become_rgb():
    grey = Image.fromarray(np.full((9, 8), 77, np.uint8))
    np.testing.assert_array_equal(decode_image(file_of(grey), "a"), np.full((9, 8, 3), 77))
    clear = Image.fromarray(np.zeros((8, 8, 4), np.uint8))
    assert (decode_image(file_of(clear), "a") == 255).all()
    colours = picture()
    np.testing.assert_array_equal(decode_image(file_of(colours), "a", ".PNG"), np.asarray(colours))


def test_a_picture_is_turned_as_its_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # stands on its right side: a quarter turn clockwise sets it up
    colours = picture()
    found = decode_image(file_of(colours, "PNG", exif=exif), "a")
    np.testing.assert_array_equal(found, np.rot90(np.asarray(colours), -1))


def test_the_several_jpegs_of_a_phone_are_a_jpeg():
    content = file_of(picture(), "MPO", save_all=True, append_images=[picture(seed=1)])
    assert Image.open(io.BytesIO(content)).format == "MPO"
    assert decode_image(content, "a", ".jpg").shape == (10, 12, 3)


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_pictures_that_are_refused(name):
    content, reason = BAD_PICTURES[name]
    with pytest.raises(UnusableSampleError, match=f"sample 'x/7': image .*{reason}") as error:
        decode_image(content, "x/7", name[name.index(".") :])
    assert " at 0x" not in str(error.value)  # addresses would make every run's records differ


def test_sound_of_any_rate_and_channels():
    left = np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100)
    found = decode_audio(sound(np.stack([left, 0 * left], 1), 44_100, "FLAC"), "a")
    assert found.dtype == np.float32 and found.shape == (16_000,)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    np.testing.assert_allclose(found[500:-500], expected[500:-500], atol=2e-3)
    assert decode_audio(sound(left, 44_100, "OGG"), "a").shape == (16_000,)


@pytest.mark.parametrize("rate", [8000, 48_000])
def test_sound_is_brought_to_16_khz(rate):
    found = decode_audio(sound(tone(0.5, rate), rate), "a")
    assert found.shape == (8000,)
    np.testing.assert_allclose(found[500:-500], tone(0.5)[500:-500], atol=2e-3)


SAMPLES = (tone() * 32767).astype("<i2").tobytes()


def claiming(kind: str, name: bytes, size: int, **options) -> bytes:
    """A good recording whose chunk `name` claims to have `size` bytes."""
    content = bytearray(sound(tone(), 16_000, kind, **options))
    place = content.index(name) + (16 if kind == "W64" else 4)
    big = kind == "AIFF" or options.get("endian") == "BIG"
    width = 8 if kind == "W64" else 4
    content[place : place + width] = size.to_bytes(width, "big" if big else "little")
    return bytes(content)


def test_a_wav_that_went_through_a_pipe_gives_what_it_holds():
    found = decode_audio(wav_header(2**32 - 1, SAMPLES), "a")
    np.testing.assert_allclose(found, tone(), atol=1e-4)


@pytest.mark.parametrize(
    "content",
    [
        wav_header(3 * 10**9, SAMPLES),
        rf64_header(10 * 10**9, SAMPLES),
        claiming("WAV", b"RIFF", 3 * 10**9),
        claiming("WAV", b"data", 3 * 10**9, endian="BIG"),
        claiming("W64", b"riff", 10 * 10**9),
        claiming("W64", b"data", 10 * 10**9),
        claiming("AIFF", b"FORM", 2**32 - 1),
        claiming("AIFF", b"SSND", 3 * 10**9),
        *(sound(tone(), 16_000, kind)[:-2] for kind in ("WAV", "RF64", "W64", "AIFF")),
    ],
)
def test_sound_that_claims_more_than_it_holds_is_refused(content):
    with pytest.raises(UnusableSampleError, match="'a': audio claims [0-9]+ bytes and holds") as error:
        decode_audio(content, "a")
    claimed, held = map(int, re.findall("[0-9]+", error.value.reason))
    assert claimed > held == len(content)


@pytest.mark.parametrize("kind", ["WAV", "WAVEX", "RF64", "W64", "AIFF"])
@pytest.mark.parametrize("seconds", [0.1, 0.10007])  # the second is odd: 1,601 samples of three bytes
def test_whole_files_of_all_containers_are_read(kind, seconds):
    content = sound(tone(seconds), 16_000, kind, subtype="PCM_24")
    np.testing.assert_allclose(decode_audio(content, "a"), tone(seconds), atol=1e-4)
    if kind == "WAV":  # programs differ in what they take for the size of the whole, and write no padding
        size = len(content).to_bytes(4, "little")
        assert len(decode_audio(content[:4] + size + content[8:], "a")) == len(tone(seconds))


@pytest.mark.parametrize("name", BAD_SOUNDS)
def test_recordings_that_are_refused(name):
    content, reason = BAD_SOUNDS[name]
    with pytest.raises(UnusableSampleError, match=f"sample 'x/7': audio .*({reason})") as error:
        decode_audio(content, "x/7")
    assert " at 0x" not in str(error.value)


@pytest.mark.parametrize(
    "caption, reason",
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("x" * (1 << 20), "has 1048576 characters, at most 20000"),
        ("a\0b", "holds NUL characters"),
        ("a \ud800 ball", "is no valid Unicode"),
        (b"a ball", "is bytes, expected text"),
    ],
)
def test_captions_that_are_refused(caption, reason):
    with pytest.raises(UnusableSampleError, match=f"sample 'x/7': caption {reason}"):
        check_caption(caption, "x/7")


def test_arrays_of_another_kind_are_refused():
    with pytest.raises(UnusableSampleError, match=r"image is float64 \[8, 8, 3\], expected uint8"):
        check_image(np.zeros((8, 8, 3)), "a")
    with pytest.raises(UnusableSampleError, match=r"audio is float32 \[2, 9\], expected float32 \[samples\]"):
        check_audio(np.zeros((2, 9), np.float32), "a")
    with pytest.raises(UnusableSampleError, match=r"audio is list, expected float32"):
        check_audio([0.0], "a")
    with pytest.raises(UnusableSampleError, match=r"has 368 samples \(23 ms\); one frame needs 400"):
        check_audio(np.zeros(368, np.float32), "a", shortest=400)
