"""Pictures and recordings as people have them: good ones, odd ones and broken ones."""

import io
import struct
import tarfile
import zlib

import numpy as np
import soundfile
from PIL import Image


def file_of(image: Image.Image, kind="PNG", **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def sound(samples, rate, kind="WAV", **options) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, samples, rate, format=kind, **options)
    return content.getvalue()


def picture(width=12, height=10, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def tone(seconds=0.1, rate=16_000) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def png_of(width: int, height: int, bits: int, colours: int, body: bytes) -> bytes:
    """A PNG from its header's fields and its rows; colour type 2 is RGB, 4 grey with alpha, 6 RGBA."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    return png_of(width, height, 8, 2, bytes(100))


def deep_png(colours: int, channels: int) -> bytes:
    """8 x 8 pixels with 16 bits a channel."""
    return png_of(8, 8, 16, colours, 8 * (b"\0" + bytes(range(16 * channels))))


def wav_header(size: int, samples: bytes) -> bytes:
    """A WAV of 16 kHz and 16 bits that claims `size` bytes of samples and holds fewer."""
    form = struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16)
    size = min(size, 2**32 - 1)  # a WAV file cannot claim more
    head = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", size)
    return b"RIFF" + struct.pack("<I", min(size + 36, 2**32 - 1)) + head + samples


def rf64_header(size: int, samples: bytes) -> bytes:
    """The same in RF64, whose sizes have 64 bits."""
    form = struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16)
    sizes = b"ds64" + struct.pack("<IQQQI", 28, size + 72, size, size // 2, 0)
    head = b"WAVE" + sizes + b"fmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", 2**32 - 1)
    return b"RF64" + struct.pack("<I", 2**32 - 1) + head + samples


PNG, WAV = file_of(picture()), sound(tone(), 16_000)


def shard(path, members, mode="w"):
    """Members are (name, bytes) or (name, TarInfo type, target)."""
    with tarfile.open(path, mode) as file:
        for name, *content in members:
            member = tarfile.TarInfo(name)
            if len(content) == 2:
                member.type, member.linkname = content
                file.addfile(member)
            else:
                member.size = len(content[0])
                file.addfile(member, io.BytesIO(content[0]))
    return path


def whole(name: str, **parts: bytes):
    parts = {"png": PNG, "txt": b"A ball.", "wav": WAV} | parts
    return [(f"{name}.{extension}", content) for extension, content in parts.items()]


COLOURS = picture(16, 16)
BAD_PICTURES = {
    "empty.png": (b"", "file is empty"),
    "truncated.png": (file_of(picture(90, 90))[:800], "cannot be decoded"),
    "truncated.jpg": (file_of(picture(90, 90), "JPEG")[:800], "cannot be decoded"),
    "wrong.jpg": (file_of(COLOURS), "is a PNG file, its name ends in .jpg"),
    "page.jpg": (b"<html>404</html>", "is no picture: none of BMP, GIF, JPEG"),
    "cmyk.jpg": (file_of(COLOURS.convert("CMYK"), "JPEG"), r"the four colours of print \(CMYK\)"),
    "palette.png": (file_of(COLOURS.quantize(4)), "has a palette; save it as RGB"),
    "palette.gif": (file_of(COLOURS.quantize(4), "GIF"), "has a palette"),
    "sixteen.png": (
        file_of(Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 200)),
        "has more than 8 bits a channel",
    ),
    "sixteen_rgb.png": (deep_png(2, 3), "has more than 8 bits a channel"),
    "sixteen_rgba.png": (deep_png(6, 4), "has more than 8 bits a channel"),
    "sixteen_grey_alpha.png": (deep_png(4, 2), "has more than 8 bits a channel"),
    "float.tif": (file_of(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "more than 8 bits"),
    "one.png": (file_of(Image.new("RGB", (1, 1))), "has 1 x 1 pixels; a side needs at least 8"),
    "huge.png": (png_header(50_000, 50_000), "cannot be decoded: Image size .2500000000 pixels. exceeds"),
    "large.png": (file_of(Image.new("1", (10_000, 5_000))), "50 million of at most 40"),
}
BAD_SOUNDS = {
    "empty.wav": (b"", "file is empty"),
    "none.wav": (sound(np.zeros(0), 16_000), "has 0 samples"),
    "one.wav": (sound(np.full(1, 0.5), 16_000), r"has 1 samples \(0.0625 ms\); one frame needs 400"),
    "silent.flac": (sound(np.zeros(16_000), 16_000, "FLAC"), "is silent from beginning to end"),
    "nan.wav": (
        sound(np.array([0.0, np.nan] * 500), 16_000, subtype="FLOAT"),
        "has 500 samples that are not finite",
    ),
    "hour.flac": (sound(np.zeros(3600 * 8000, np.int16), 8000, "FLAC"), "is 3600 s long, at most 1800"),
    "claims.wav": (wav_header(10 * 10**9, b""), "has 0 samples"),
    "claims64.wav": (rf64_header(10 * 10**9, bytes(800)), "claims 10000000080 bytes and holds 880"),
    "truncated.flac": (sound(tone(), 16_000, "FLAC")[:20], "cannot be decoded"),
    "text.wav": (b"not found", "cannot be decoded: Format not recognised"),
    "rate.wav": (sound(np.zeros(400), 1_000_000_007), "has 1000000007 samples a second"),
    "loud.wav": (sound(np.full(400, 1e30), 16_000, subtype="FLOAT"), "has samples up to 1e.30"),
    "slow.wav": (sound(np.zeros(4000), 1), "is 4000 s long, at most 1800"),
}
