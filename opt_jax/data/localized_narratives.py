"""Localized Narratives: pictures of Open Images, COCO, Flickr30k and ADE20k, described aloud.

The lists are JSON lines as published (google.github.io/localized-narratives, Pont-Tuset et al., 2020); join
those that come in several files with `cat`. Of a line `dataset_id`, `image_id`, `annotator_id`, `caption` and
`voice_recording` are used.
"""

import dataclasses
import os
import re
import reprlib

from opt_jax.data.files import check_name
from opt_jax.data.lines import Lines
from opt_jax.data.row import Row, row_of
from opt_jax.data.rows import RowSource
from opt_jax.data.triplet import UnusableSampleError

RECORDING = re.compile(r"(\w+)/\w+_([0-9]+)_[0-9]+\.")


class LocalizedNarratives(RowSource):
    """Narratives; the id of one is dataset/image/annotator, and all of one picture are held out together.

    Args:
      path: the list. images: folder of the pictures, called as in their data sets; they may also lie in the
        sub folders that these come with. recordings: folder of the Ogg files, in the sub folders that
        `voice_recording` names, as they are published. Without a folder no sample has the modality.
    """

    image_subfolders = (
        *("train2017", "val2017"),  # COCO
        *("train", "validation", "test"),  # Open Images
        *("training", "validation", "images/training", "images/validation"),  # ADE20k
        "flickr30k-images",
    )

    def __init__(self, path, images=None, recordings=None, class_names=None):
        self.lines = Lines(path)
        folders = {"image": images, "audio": recordings}
        folders = {part: folder for part, folder in folders.items() if folder is not None}
        identity = {"sha256": self.lines.sha256, "folders": sorted(folders)}
        super().__init__("localized_narratives", folders, identity, class_names)

    def __len__(self) -> int:
        return len(self.lines)

    def row(self, index: int) -> Row:
        fields, name = self.lines.json(index), self.lines.name_of(index)
        parts = [fields.get(part) for part in ("dataset_id", "image_id", "annotator_id")]
        if not all(isinstance(part, str | int) for part in parts):
            reason = f"is made of dataset_id, image_id and annotator_id, which are {reprlib.repr(parts)}"
            raise UnusableSampleError(name, "id", reason)
        dataset, image, annotator = map(str, parts)
        row = row_of(
            {
                "id": f"{dataset}/{image}/{annotator}",
                "image": f"{image.zfill(12) if 'coco' in dataset else image}.jpg",
                "caption": fields.get("caption"),
                "audio": fields.get("voice_recording"),
                "speaker": annotator,
                "group": f"{dataset}/{image}",
            },
            name,
        )
        return dataclasses.replace(
            row,
            image=row.image if "image" in self.folders else None,
            audio=self._recording(row, dataset)
            if "audio" in self.folders and row.audio is not None
            else None,
        )

    def _recording(self, row: Row, dataset: str) -> str:
        """Where the sound of a row is.

        The lists of Flickr30k and ADE20k call it otherwise than the published files are called; the loader
        that comes with the lists (localized_narratives.py, `voice_recording_url`) says how these are.
        """
        check_name(row.audio, row.id, "audio")
        match = RECORDING.search(row.audio) if "Flic" in dataset or "ADE" in dataset else None
        if match is None or os.path.isfile(self.folders["audio"] / row.audio):
            return row.audio
        folder, number = match.groups()
        return f"{folder}/{folder}_{number.zfill(16)}_{row.speaker}.ogg"
