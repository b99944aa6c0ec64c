"""Pictures and sound from the bytes of files: sizes are capped before anything is decoded.

Errors say which sample they are about; what they are about is left out, the others go on. Sound that was cut
off is refused, but for Ogg and MP3, whose headers do not tell.
"""

import io
import math
import warnings
from collections.abc import Iterator

import numpy as np
import soundfile
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy.signal import resample_poly

from opt_jax.data.triplet import UnusableSampleError

MAX_PIXELS = 40_000_000
MIN_SIDE = 8  # pixels; less holds nothing to see, and is most often a placeholder of a web page
MAX_SECONDS = 1800
MAX_NUMBERS = 1 << 26  # samples of all channels together
SHORTEST = 400  # samples, 25 ms: one frame of wav2vec 2.0
QUIETEST = 1e-5  # of full scale: below the last bit of 16
MAX_CAPTION = 20_000  # characters
FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".gif": "GIF",
}
KNOWN = sorted(set(FORMATS.values()))
REFUSED_MODES = {
    "P": "a palette",
    "PA": "a palette",
    "CMYK": "the four colours of print (CMYK)",
    "YCCK": "the four colours of print",
    "I": "more than 8 bits a channel",
    "F": "more than 8 bits a channel",
    "LAB": "Lab colours",
    "HSV": "HSV colours",
}
RATES = (1_000, 400_000)  # samples a second
LOUDEST = 1e6  # 16-bit numbers that nobody scaled stay far below
SAMPLE_RATE = 16_000
# A size of WAV that says nothing: ffmpeg and others write it into a pipe, where they cannot come back to it.
UNKNOWN = 2**32 - 1
MOST_CHUNKS = 1000  # looked through for the one of the samples; files have a few


def check_image(image: np.ndarray, sample_id: str) -> None:
    """Raises UnusableSampleError unless `image` is uint8 [h, w, 3] with sides and area within the bounds."""
    if not _is(image, np.uint8, 3) or image.shape[2] != 3:
        found = _described(image)
        raise UnusableSampleError(sample_id, "image", f"is {found}, expected uint8 [height, width, 3]")
    _check_sides(*image.shape[:2], sample_id)


def _check_sides(height: int, width: int, sample_id: str) -> None:
    if min(height, width) < MIN_SIDE:
        raise UnusableSampleError(
            sample_id, "image", f"has {width} x {height} pixels; a side needs at least {MIN_SIDE}"
        )
    if height * width > MAX_PIXELS:
        raise UnusableSampleError(
            sample_id,
            "image",
            f"has {width} x {height} pixels, {height * width / 1e6:.0f} million of at most"
            f" {MAX_PIXELS // 1_000_000}; make it smaller",
        )


def check_audio(audio: np.ndarray, sample_id: str, shortest: int = 1) -> None:
    """Raises UnusableSampleError unless `audio` is finite float32 [N] with N at least `shortest` samples."""
    if not _is(audio, np.float32, 1):
        found = _described(audio)
        raise UnusableSampleError(sample_id, "audio", f"is {found}, expected float32 [samples]")
    if len(audio) < shortest:
        raise UnusableSampleError(
            sample_id,
            "audio",
            f"has {len(audio)} samples ({1000 * len(audio) / SAMPLE_RATE:g} ms); one frame needs {shortest}",
        )
    if not np.isfinite(audio).all():
        count = int((~np.isfinite(audio)).sum())
        raise UnusableSampleError(sample_id, "audio", f"has {count} samples that are not finite numbers")
    if np.abs(audio).max() < QUIETEST:
        raise UnusableSampleError(sample_id, "audio", "is silent from beginning to end")
    if np.abs(audio).max() > LOUDEST:
        raise UnusableSampleError(
            sample_id, "audio", f"has samples up to {np.abs(audio).max():.0e}; samples lie between -1 and 1"
        )


def check_caption(caption: str, sample_id: str) -> None:
    """Raises UnusableSampleError unless `caption` is text of a sensible length, writable as UTF-8."""
    if not isinstance(caption, str):
        raise UnusableSampleError(sample_id, "caption", f"is {type(caption).__name__}, expected text")
    if not caption.strip():
        raise UnusableSampleError(sample_id, "caption", "is empty; leave the field out where there is none")
    if len(caption) > MAX_CAPTION:
        raise UnusableSampleError(
            sample_id, "caption", f"has {len(caption)} characters, at most {MAX_CAPTION}"
        )
    if "\0" in caption:
        raise UnusableSampleError(sample_id, "caption", "holds NUL characters")
    if not is_unicode(caption):
        raise UnusableSampleError(sample_id, "caption", "is no valid Unicode: it cannot be written as UTF-8")


def is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8: JSON may hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is(value, dtype, dimensions: int) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == dtype and value.ndim == dimensions


def _described(value) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__


def decode_image(content: bytes, sample_id: str, extension: str = "") -> np.ndarray:
    """A picture file (RGB, grey or transparent, of 8 bits) as RGB uint8 [h, w, 3].

    Turned as its EXIF says; what is transparent becomes white. Refused, as what they show depends on more
    than the numbers: palettes, print colours, more than 8 bits; and a file that is not what its `extension`
    (as '.jpg') says, which is most often the answer of a server in place of the picture. Raises
    UnusableSampleError.
    """
    if not content:
        raise UnusableSampleError(sample_id, "image", "file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound here is lower
            picture = Image.open(io.BytesIO(content), formats=KNOWN)
        kind = "JPEG" if picture.format == "MPO" else picture.format  # MPO: of phones, several JPEGs in one
        if kind != FORMATS.get(extension.lower(), kind):
            raise UnusableSampleError(
                sample_id, "image", f"is a {kind} file, its name ends in {extension}; rename it"
            )
        _check_sides(picture.height, picture.width, sample_id)
        mode = REFUSED_MODES.get(picture.mode.split(";")[0])
        if mode or _bits(picture, content) > 8:
            mode = mode or REFUSED_MODES["I"]
            raise UnusableSampleError(sample_id, "image", f"has {mode}; save it as RGB of 8 bits")
        picture = ImageOps.exif_transpose(picture)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return np.asarray(picture.convert("RGB"))
    except UnusableSampleError:
        raise
    except UnidentifiedImageError as error:
        raise UnusableSampleError(sample_id, "image", f"is no picture: none of {', '.join(KNOWN)}") from error
    except Exception as error:  # decoders raise all kinds on damaged files
        raise UnusableSampleError(sample_id, "image", f"cannot be decoded: {error}") from error


def _bits(picture: Image.Image, content: bytes) -> int:
    """Bits a channel, as the file says; Pillow cuts colours of 16 to 8 as it opens them."""
    if picture.format == "PNG":
        return content[24]  # in the header, which comes first
    return max(picture.tag_v2.get(258, (8,))) if picture.format == "TIFF" else 8


def decode_audio(content: bytes, sample_id: str) -> np.ndarray:
    """A sound file (WAV, FLAC, Ogg, MP3) as float32 [N], 16 kHz, the mean of its channels.

    Raises UnusableSampleError, also for more than MAX_SECONDS.
    """
    if not content:
        raise UnusableSampleError(sample_id, "audio", "file is empty")
    if (claimed := max(_claims(content), default=0)) > len(content):
        reason = f"claims {claimed} bytes and holds {len(content)}; it was cut off, copy or write it anew"
        raise UnusableSampleError(sample_id, "audio", reason)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate, seconds = file.samplerate, file.frames / file.samplerate
            if file.frames > 1 << 40:  # libsndfile's largest number, where the header says nothing
                raise UnusableSampleError(
                    sample_id, "audio", "does not tell its length, as a stream that was cut; write it anew"
                )
            if seconds > MAX_SECONDS:
                raise UnusableSampleError(
                    sample_id, "audio", f"is {seconds:.0f} s long, at most {MAX_SECONDS}; cut it"
                )
            if not RATES[0] <= rate <= RATES[1]:
                raise UnusableSampleError(
                    sample_id, "audio", f"has {rate} samples a second, not {RATES[0]} to {RATES[1]}"
                )
            if file.frames * file.channels > MAX_NUMBERS:
                raise UnusableSampleError(
                    sample_id, "audio", f"has {file.channels} channels of {file.frames} samples; cut it"
                )
            waveform = file.read(dtype="float32", always_2d=True).mean(axis=1)
        waveform = resampled(waveform, rate)
    except UnusableSampleError:
        raise
    except soundfile.LibsndfileError as error:
        reason = f"cannot be decoded: {error.error_string}"
        raise UnusableSampleError(sample_id, "audio", reason) from error
    except Exception as error:  # decoders raise all kinds on damaged files
        raise UnusableSampleError(sample_id, "audio", f"cannot be decoded: {error}") from error
    check_audio(waveform, sample_id, SHORTEST)
    return waveform


def _claims(content: bytes) -> Iterator[int]:
    """Bytes that the header of a WAV, RF64, W64 or AIFF file says it has: as a whole, 8 less as some programs
    count the header too or padding that they do not write, and up to the end of its samples."""
    kind = content[:4]
    if kind not in (b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM", b"riff"):
        return
    order = "big" if kind in (b"FORM", b"RIFX") else "little"
    wide = kind == b"riff"  # W64: names of 16 bytes, sizes of 8, which count themselves and the name
    head, step, place = (24, 8, 40) if wide else (8, 2, 12)

    def size(place: int, instead: int) -> int:
        """Of a chunk with its head; 0 where it is unknown. RF64 has in `instead` what 32 bits cannot hold."""
        if wide:
            return int.from_bytes(content[place + 16 : place + 24], order)
        claimed = int.from_bytes(content[place + 4 : place + 8], order)
        if claimed == UNKNOWN and kind in (b"RF64", b"BW64"):
            claimed = int.from_bytes(content[instead : instead + 8], order)
        return 0 if claimed == UNKNOWN and kind != b"FORM" else claimed + head

    yield size(0, 20) - 8
    for _ in range(MOST_CHUNKS):
        if content[place : place + 4] in (b"data", b"SSND"):
            yield place + size(place, 28)
            return
        place += -(-max(size(place, 28), head) // step) * step


def resampled(waveform: np.ndarray, rate: int) -> np.ndarray:
    """float32 [N] at `rate` samples a second -> float32 [M] at 16 kHz."""
    if rate == SAMPLE_RATE:
        return waveform
    common = math.gcd(rate, SAMPLE_RATE)
    return resample_poly(waveform, SAMPLE_RATE // common, rate // common).astype(np.float32)
