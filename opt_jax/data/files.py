"""Files that a source's rows name, inside one folder; and the members of tar shards."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from opt_jax.data.decoding import decode_audio, decode_image, is_unicode
from opt_jax.data.triplet import SourceError, UnusableSampleError

# What is wrong with one name; all else, such as a disk that fails, is no reason to go on without the sample.
ABOUT_ONE_FILE = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EINVAL, errno.EILSEQ),
)
MAX_BYTES = 256 << 20  # of one file


def check_name(name: str, sample_id: str, part: str) -> None:
    """Raises UnusableSampleError for a name that would leave its folder, or is none."""
    path = PurePosixPath(name.replace("\\", "/")) if isinstance(name, str) else None
    if not path or not path.name or "\0" in name or not is_unicode(name):
        raise UnusableSampleError(sample_id, part, f"is {name!r}, expected the name of a file")
    if path.is_absolute() or ".." in path.parts or PureWindowsPath(name).drive:
        raise UnusableSampleError(
            sample_id, part, f"{name!r} leaves the folder of its list; give it from there"
        )


def read_file(folder: Path, name: str, sample_id: str, part: str) -> bytes:
    """The bytes of `folder`/`name`. `folder` is resolved already.

    Raises UnusableSampleError, naming part and file: missing, too large, no file, or outside of the folder
    (also by way of a link). Raises SourceError where the folder is gone, or the storage fails.
    """
    check_name(name, sample_id, part)
    try:
        path = (folder / name).resolve(strict=True)
        if not path.is_relative_to(folder):
            raise UnusableSampleError(sample_id, part, f"{name!r} is a link that leaves {folder}")
        if not path.is_file():  # a pipe would wait for ever
            raise UnusableSampleError(sample_id, part, f"{name!r} in {folder} is no file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise UnusableSampleError(
                    sample_id, part, f"{name!r} has {size >> 20} MiB, at most {MAX_BYTES >> 20}"
                )
            return file.read(MAX_BYTES)
    except (OSError, RuntimeError) as error:  # RuntimeError: links that go round in a circle
        reason = getattr(error, "strerror", None) or error
        about_this_file = not isinstance(error, OSError) or error.errno in ABOUT_ONE_FILE
        if not about_this_file or not folder.is_dir():
            raise SourceError(f"{folder / name} cannot be read: {reason}; is its storage there?") from error
        raise UnusableSampleError(
            sample_id, part, f"{name!r} cannot be read in {folder}: {reason}"
        ) from error


def found(folder: Path, name: str, subfolders: Sequence[str]) -> str:
    """`name`, or the first `subfolder`/`name` that is a file in `folder` where `name` itself is none."""
    names = [name, *(f"{subfolder}/{name}" for subfolder in subfolders)]
    return next((name for name in names if os.path.isfile(folder / name)), name)


def decoded(content: bytes, name: str, sample_id: str, part: str):
    """The picture (uint8 [h, w, 3]) or sound (float32 [N]) of a file; the name tells its kind."""
    if part == "audio":
        return decode_audio(content, sample_id)
    return decode_image(content, sample_id, PurePosixPath(name).suffix)
