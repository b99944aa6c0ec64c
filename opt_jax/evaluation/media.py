"""Pictures and speech as data URIs, so that a page is one file. Paths are untrusted: see `Media`."""

import base64
from pathlib import Path

_KINDS = {
    "image": {"image/png": lambda head: head[:8] == b"\x89PNG\r\n\x1a\n"},
    "audio": {
        # A frame of MPEG audio begins with eleven set bits.
        "audio/mpeg": lambda head: head[:3] == b"ID3" or (head[:1] == b"\xff" and head[1:2] >= b"\xe0"),
        "audio/wav": lambda head: head[:4] == b"RIFF" and head[8:12] == b"WAVE",
    },
}


class Media:
    """Reads PNG, MP3 and WAV files inside one directory, up to a size per file and in all.

    `inline` returns {"uri": data URI} or {"problem": why the file is not shown}: a page with a gap is worth
    more than no page. The kind is told by the file's first bytes, not its name; links are followed before
    the check.
    """

    def __init__(self, root: Path, *, max_file_bytes: int = 700_000, max_total_bytes: int = 5_500_000):
        self.root = root.resolve()
        self.max_file_bytes = max_file_bytes
        self.bytes_left = max_total_bytes

    def inline(self, path: object, kind: str) -> dict[str, str]:
        """path: relative to the root; kind: "image" (PNG) or "audio" (MP3, WAV)."""
        if not isinstance(path, str) or "\0" in path:
            return {"problem": f"not a path: {path!r}"}
        file = (self.root / path).resolve()
        if not file.is_relative_to(self.root):
            return {"problem": f"{path}: outside {self.root.name}/"}
        if not file.is_file():
            return {"problem": f"{path}: no such file"}
        size = file.stat().st_size
        if size > self.max_file_bytes:
            return {"problem": f"{path}: {size:,} bytes, over {self.max_file_bytes:,}"}
        if size > self.bytes_left:
            return {"problem": f"{path}: left out to keep the page small"}
        content = file.read_bytes()
        mime = next((mime for mime, matches in _KINDS[kind].items() if matches(content[:12])), None)
        if mime is None:
            return {"problem": f"{path}: not {' or '.join(_KINDS[kind])}"}
        self.bytes_left -= len(content)
        return {"uri": f"data:{mime};base64,{base64.b64encode(content).decode()}"}
