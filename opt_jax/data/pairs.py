"""Published sets of pictures and sentences without sound: Conceptual Captions, COCO captions, Visual Genome.

In all of them `images` is the folder of the pictures; without it the samples are sentences only.
"""

import abc
import collections
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from opt_jax.data.decoding import check_caption
from opt_jax.data.files import read_file
from opt_jax.data.lines import Lines, Texts
from opt_jax.data.row import Row, row_of
from opt_jax.data.rows import RowSource
from opt_jax.data.triplet import SourceError, UnusableSampleError

NAMES = {
    "img2dataset": lambda row, url: f"{row // 10_000:05d}/{row:09d}.jpg",
    "crc32": lambda row, url: str(zlib.crc32(url.encode())),
    "row": lambda row, url: f"{row}.jpg",
}


class ConceptualCaptions(RowSource):
    """Conceptual Captions: lines 'caption<TAB>url' (ai.google.com/research/ConceptualCaptions).

    The other order (Conceptual 12M) and a first line 'caption<TAB>url' are recognised. What img2dataset wrote
    as webdataset is better opened as tar shards.

    Args:
      path: the list. images: see above. names: what the pictures are called. 'img2dataset': as it writes
        files (--output_format files, of 10,000 to a folder), 00001/000012345.jpg, where the .json beside a
        picture has to name the row's url if it is there; 'crc32': as ViLBERT's downloader does,
        the CRC of the url; 'row': the number of the row, from 0, and .jpg; 'column': as a third column says.
    """

    image_subfolders = ("training", "validation")

    def __init__(self, path, images=None, names="img2dataset", class_names=None):
        if names not in (*NAMES, "column"):
            raise SourceError(f"names={names}; choose from {', '.join((*NAMES, 'column'))}")
        self.lines, self._names = Lines(path), names
        self._header = int(len(self.lines) and self.lines[0][:11].lower() == b"caption\turl")
        identity = {"sha256": self.lines.sha256, "images": images is not None, "names": names}
        super().__init__("conceptual_captions", {"image": images} if images else {}, identity, class_names)

    def __len__(self) -> int:
        return len(self.lines) - self._header

    def _cells(self, index: int) -> list[str]:
        """Caption, url and what follows."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {self.lines.path}: there are {len(self)}")
        cells, needed = self.lines.cells(index + self._header, "\t"), 3 if self._names == "column" else 2
        if len(cells) < needed:
            reason = f"has {len(cells)} cells, expected {needed}: caption, url" + ", name" * (needed - 2)
            raise UnusableSampleError(self.lines.name_of(index), "row", reason)
        return cells[1::-1] + cells[2:] if cells[0].startswith(("http://", "https://")) else cells

    def row(self, index: int) -> Row:
        caption, url, *others = self._cells(index)
        name = others[0] if self._names == "column" else NAMES[self._names](index, url)
        return Row(f"{index:09d}", name if self.folders else None, caption, references=(caption,), group=url)

    def content(self, name: str, sample_id: str, part: str) -> bytes:
        if (
            self._names == "img2dataset"
        ):  # it counts quoted line breaks differently: its rows may have shifted
            beside = name.replace(".jpg", ".json")
            if (self.folders["image"] / beside).is_file():
                text = read_file(self.folders["image"], beside, sample_id, part)
                try:
                    same = json.loads(text)["url"] == self._cells(int(sample_id))[1]
                except (ValueError, TypeError, KeyError, RecursionError):
                    same = False
                if not same:
                    reason = f"{name!r} comes from another url than the row's, says {beside!r}"
                    raise UnusableSampleError(sample_id, part, reason)
        return super().content(name, sample_id, part)


class JsonSource(RowSource):
    """Rows out of one JSON document, which is parsed whole; they stay in memory as short texts.

    Subclasses give `fields_of`.
    """

    kind: str

    def __init__(self, path, images=None, class_names=None):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                file.seek(0)
                content = json.load(file)
            self._rows = Texts(json.dumps(fields).encode() for fields in self.fields_of(content))
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{self.path} is no valid JSON: {error}") from error
        identity = {"sha256": digest, "images": images is not None}
        super().__init__(self.kind, {"image": images} if images else {}, identity, class_names)

    @abc.abstractmethod
    def fields_of(self, content) -> Iterator[dict]:
        """The fields (see `row_of`) of all rows. Raises SourceError where the document is another."""

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {self.path}: there are {len(self)}")
        fields = json.loads(self._rows[index])
        if not self.folders:
            fields["image"] = None
        row = row_of(fields, f"{self.path.name}, row {index}")
        if self.folders and row.image is None:
            raise UnusableSampleError(row.id, "image", f"of the row is not named in {self.path.name}")
        return row


class CocoCaptions(JsonSource):
    """COCO's captions_train2017.json and its like (cocodataset.org): a row for each caption.

    The picture's other captions are among its `references`.
    """

    kind = "coco_captions"
    image_subfolders = ("train2017", "val2017", "train2014", "val2014")

    def fields_of(self, content) -> Iterator[dict]:
        images, annotations = _list(content, "images", self.path), _list(content, "annotations", self.path)
        names = {str(_get(image, "id")): _get(image, "file_name") for image in images}
        references = collections.defaultdict(list)
        for annotation in annotations:
            if is_caption(_get(annotation, "caption")):
                references[str(_get(annotation, "image_id"))].append(annotation["caption"].strip())
        for annotation in annotations:
            image = str(_get(annotation, "image_id"))
            yield {
                "id": _get(annotation, "id"),
                "image": names.get(image),
                "caption": _stripped(_get(annotation, "caption")),
                "references": references[image],
                "group": image,
            }


class VisualGenome(JsonSource):
    """Visual Genome's region_descriptions.json (visualgenome.org): a row for each phrase.

    The picture is the whole one, as in UNITER, not the region that the phrase is about.
    """

    kind = "visual_genome"
    image_subfolders = ("VG_100K", "VG_100K_2")

    def fields_of(self, content) -> Iterator[dict]:
        if not isinstance(content, list):
            raise SourceError(f"{self.path} holds {type(content).__name__}, expected a list of pictures")
        for picture in content:
            regions = _get(picture, "regions")
            for region in regions if isinstance(regions, list) else [None]:
                image = _get(picture, "id") or _get(picture, "image_id") or _get(region, "image_id")
                name = f"{image}.jpg" if isinstance(image, int) else None
                sample_id = f"{image}/{_get(region, 'region_id')}"
                yield {"id": sample_id, "image": name, "caption": _stripped(_get(region, "phrase"))}


def _get(entry, name: str):
    return entry.get(name) if isinstance(entry, dict) else None


def _list(content, name: str, path: Path) -> list:
    value = _get(content, name)
    if not isinstance(value, list):
        raise SourceError(f"{path} has no list {name!r}; it should be COCO's file of captions")
    return value


def _stripped(caption):
    """Some of COCO's captions end in line breaks. No caption at all is an empty one: the row is unusable."""
    return caption.strip() if isinstance(caption, str) else caption or ""


def is_caption(caption) -> bool:
    """Whether `check_caption` has nothing against it."""
    try:
        check_caption(caption, "")
    except UnusableSampleError:
        return False
    return True
