"""LibriSpeech (openslr.org/12, Panayotov et al., 2015): recordings of audio books and their transcripts.

    librispeech:LibriSpeech/{split},train=train-clean-100,validation=dev-clean,test=test-clean

A path without {split} is one list, of which speakers are held out.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from opt_jax.data.files import read_file
from opt_jax.data.lines import Texts
from opt_jax.data.row import Row
from opt_jax.data.rows import RowSource
from opt_jax.data.triplet import SourceError, UnusableSampleError

NUMBER = re.compile("[0-9]{1,12}")
RECORDING = ".flac"


class LibriSpeech(RowSource):
    """The folder of one split, such as LibriSpeech/test-clean, with 1089/134686/1089-134686-0000.flac in it.

    Published transcripts are in upper case; the captions are the same in lower case. The id is that of the
    utterance. All of one speaker are held out together, as the published splits share no speaker either. A
    recording without transcript is an unusable row, as is a transcript without recording.

    Opening reads the transcripts, which stay in memory, and the names of the recordings.
    """

    def __init__(self, path, class_names=None):
        folder, digest = Path(path).resolve(), hashlib.sha256()
        self._rows = Texts()  # speaker/chapter, number of the line in its list and the line, tabs between
        for chapter in _chapters(folder):
            content = _transcripts(folder, chapter)
            digest.update(f"{chapter}\0{len(content)}\0".encode() + content)
            named = set()
            for number, line in enumerate(content.splitlines()):
                if line.strip():
                    named.add(line.partition(b" ")[0])
                    self._rows.append(b"%b\t%d\t%b" % (chapter.encode(), number, line))
            for name in sorted(_recordings(folder / chapter) - named):
                self._rows.append(b"%b\t\t%b" % (chapter.encode(), name))
        if not len(self._rows):
            raise SourceError(
                f"{folder} holds no SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt; name the folder of one split,"
                " such as LibriSpeech/test-clean"
            )
        super().__init__("librispeech", {"audio": folder}, {"sha256": digest.hexdigest()}, class_names)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {self.folders['audio']}: there are {len(self)}")
        place, number, line = self._rows[index].split(b"\t", 2)
        chapter = place.decode()
        speaker, stem = chapter.split("/")[0], chapter.replace("/", "-")
        # A file's name, and so a recording that no line names, may hold any bytes.
        sample_id, _, transcript = line.decode(errors="backslashreplace").partition(" ")
        if not re.fullmatch(f"{stem}-{NUMBER.pattern}", sample_id):
            name = f"{_list_of(chapter)}, row {number.decode()}" if number else f"{chapter}, a recording"
            raise UnusableSampleError(name, "id", f"is {sample_id[:80]!r}, expected {stem}-NUMBER")
        if not number or not transcript.strip():
            reason = f"has no transcript in {_list_of(chapter)}"
            raise UnusableSampleError(sample_id, "caption", reason)
        try:
            caption = line.decode().partition(" ")[2].strip().lower()
        except UnicodeDecodeError as error:
            reason = f"is no valid UTF-8 in {_list_of(chapter)}: {error}"
            raise UnusableSampleError(sample_id, "caption", reason) from error
        audio = f"{chapter}/{sample_id}{RECORDING}"
        return Row(sample_id, None, caption, audio, references=(caption,), speaker=speaker, group=speaker)


def _chapters(folder: Path) -> Iterator[str]:
    """'speaker/chapter', in order."""
    for speaker in _numbered(folder):
        for chapter in _numbered(folder / speaker):
            yield f"{speaker}/{chapter}"


def _numbered(folder: Path) -> list[str]:
    return sorted(name for name in _names(folder, os.DirEntry.is_dir) if NUMBER.fullmatch(name))


def _recordings(folder: Path) -> set[bytes]:
    names = _names(folder, os.DirEntry.is_file)
    return {os.fsencode(name.removesuffix(RECORDING)) for name in names if name.endswith(RECORDING)}


def _names(folder: Path, kind) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if kind(entry)]
    except OSError as error:
        raise SourceError(f"{folder} cannot be read: {error.strerror}") from error


def _list_of(chapter: str) -> str:
    return f"{chapter}/{chapter.replace('/', '-')}.trans.txt"


def _transcripts(folder: Path, chapter: str) -> bytes:
    """The list of a chapter's transcripts; empty where it is missing: each recording will say so."""
    if not os.path.lexists(folder / _list_of(chapter)):
        return b""
    try:
        return read_file(folder, _list_of(chapter), chapter, "transcripts")
    except UnusableSampleError as error:
        raise SourceError(f"{folder / _list_of(chapter)} cannot be read: {error.reason}") from error
