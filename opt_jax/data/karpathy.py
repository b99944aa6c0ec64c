"""Karpathy's splits of Flickr8k, Flickr30k and COCO: dataset_flickr30k.json, dataset_coco.json.

One document holds all pictures, each with its split and its sentences (Karpathy and Fei-Fei, 2015;
cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip):

    karpathy:dataset_coco.json,images=coco
    karpathy:dataset_flickr30k.json,images=flickr30k,rows=sentences
"""

import collections
import reprlib
from collections.abc import Iterator

from opt_jax.data.pairs import JsonSource, is_caption
from opt_jax.data.row import Row
from opt_jax.data.triplet import SourceError, UnusableSampleError

SPLITS = ("train", "val", "test", "restval")
ROWS = ("images", "sentences", "training_sentences")
RESTVAL = ("train", "apart")


class Karpathy(JsonSource):
    """One split of the document. A sentence is its `raw`; one that is no text is not among `references`.

    A picture whose split is none of the known ones is an unusable row of every split.

    Args:
      path: the document. split: 'train', 'val' (or 'validation'), 'test' or 'restval'. images: the folder
        with what the pictures' `filepath` names, as train2014 and val2014, or with the pictures themselves
        where there is none; without it the samples are sentences only. rows: 'images', a row a picture,
        whose id is `imgid` and whose caption is the first sentence; or 'sentences', a row a sentence,
        imgid/number from 0, those of one picture in one group; or 'training_sentences', these for training
        and a row a picture elsewhere, where captions are compared with all of its sentences. restval: 'train'
        adds the pictures of COCO's validation set that are in neither val nor test to train, as is usual;
        'apart' leaves them to their own split.
    """

    kind = "karpathy"
    image_subfolders = ("flickr30k-images", "flickr30k_images", "Flicker8k_Dataset")

    def __init__(self, path, split, images=None, rows="images", restval="train", class_names=None):
        split = "val" if split == "validation" else split
        for option, value, known in (
            ("split", split, SPLITS),
            ("rows", rows, ROWS),
            ("restval", restval, RESTVAL),
        ):
            if value not in known:
                raise SourceError(f"karpathy:{path}: {option}={value}; choose from {', '.join(known)}")
        if rows == "training_sentences":
            rows = "sentences" if split == "train" else "images"
        self._rows_are, self._unknown_splits = rows, {}
        self._splits = {split, "restval"} if (split, restval) == ("train", "train") else {split}
        super().__init__(path, images, class_names)
        self.identity |= {"splits": sorted(self._splits), "rows": rows}

    def fields_of(self, content) -> Iterator[dict]:
        pictures = content.get("images") if isinstance(content, dict) else None
        if not isinstance(pictures, list):
            raise SourceError(f"{self.path} has no list 'images'; expected one as in dataset_coco.json")
        number, found = 0, collections.Counter()
        for picture in pictures:
            picture = picture if isinstance(picture, dict) else {}
            split = picture.get("split")
            known = isinstance(split, str) and split in SPLITS
            found.update([split] if known else [])
            if known and split not in self._splits:
                continue
            for fields in self._rows_of(picture):
                if not known:
                    self._unknown_splits[number] = reprlib.repr(split)
                number += 1
                yield fields
        if not number:
            counts = ", ".join(f"{count} of {split}" for split, count in found.items()) or "none at all"
            raise SourceError(f"{self.path} has no pictures of {' or '.join(sorted(self._splits))}: {counts}")

    def _rows_of(self, picture: dict) -> Iterator[dict]:
        number, sentences = picture.get("imgid"), picture.get("sentences")
        captions = [_raw(sentence) for sentence in sentences] if isinstance(sentences, list) else []
        references = [caption for caption in captions if is_caption(caption)]
        fields = {"id": number, "image": _image(picture), "references": references, "group": str(number)}
        if self._rows_are == "images":
            yield fields | {"caption": references[0] if references else ""}
            return
        for place, caption in enumerate(captions or [""]):
            sample_id = f"{number}/{place}" if isinstance(number, int | str) else number
            yield fields | {"id": sample_id, "caption": caption}

    def row(self, index: int) -> Row:
        row = super().row(index)
        if index in self._unknown_splits:
            reason = f"has the split {self._unknown_splits[index]}, expected {', '.join(SPLITS)}"
            raise UnusableSampleError(row.id, "row", reason)
        return row


def _image(picture: dict):
    """Name of the picture's file, or what is there that is none: `row_of` refuses it."""
    folder, name = picture.get("filepath"), picture.get("filename")
    if folder in (None, "") or name is None:
        return name
    return f"{folder}/{name}" if isinstance(folder, str) and isinstance(name, str) else [folder, name]


def _raw(sentence):
    """A sentence's text, or what is there instead. None at all is an empty one: the row is unusable."""
    raw = sentence.get("raw") if isinstance(sentence, dict) else None
    return raw.strip() if isinstance(raw, str) else "" if raw is None else raw
