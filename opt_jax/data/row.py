"""A sample as a list names it, before any file is read; its fields checked."""

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any

from opt_jax.data.decoding import is_unicode
from opt_jax.data.triplet import UnusableSampleError

MAX_ID = 512  # characters
LISTS = ("labels", "references")


@dataclasses.dataclass(frozen=True)
class Row:
    """A sample as a list names it; None is what it has not.

    Attributes:
      id: name of the sample. image, audio: names of files. caption: the sentence. references: all of them,
        the caption first. labels: names of classes. speaker: name of the voice. features: name of what a
        detector found in the picture. group: what the rows of one picture share, where this is not `image`.
    """

    id: str
    image: str | None = None
    caption: str | None = None
    audio: str | None = None
    labels: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    speaker: str | None = None
    features: str | None = None
    group: str | None = None


FIELDS = tuple(field.name for field in dataclasses.fields(Row))


def row_of(fields: Mapping[str, Any], name: str) -> Row:
    """A row from its fields, each of the type that it has in `Row` (None and unknown ones are left out).

    `name` is what the row is called until its id is known. Raises UnusableSampleError.
    """
    sample_id = fields.get("id")
    if isinstance(sample_id, int) and not isinstance(sample_id, bool):
        sample_id = str(sample_id)
    if not isinstance(sample_id, str):
        raise UnusableSampleError(name, "id", f"is {reprlib.repr(sample_id)}, expected text")
    values = {}
    for field in FIELDS[1:]:
        value = fields.get(field)
        if value is None:
            continue
        if field in LISTS:
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                reason = f"is {reprlib.repr(value)}, expected a list of texts"
                raise UnusableSampleError(sample_id, field, reason)
            if field == "labels" and not all(item.strip() for item in value):
                raise UnusableSampleError(sample_id, field, "holds an empty name")
            value = tuple(value)
        elif not isinstance(value, str):
            raise UnusableSampleError(sample_id, field, f"is {reprlib.repr(value)}, expected text")
        if not is_unicode("".join(value)):
            raise UnusableSampleError(sample_id, field, "is no valid Unicode: it cannot be written as UTF-8")
        values[field] = value
    captions = [values["caption"]] if "caption" in values else []
    captions += [text for text in values.get("references", ()) if text not in captions]
    if captions:
        values |= {"caption": captions[0], "references": tuple(captions)}
    return Row(id=sample_id, **values)


def check_id(sample_id: str) -> None:
    """Raises UnusableSampleError for an id that is no short line of text, or looks like a path."""
    if not sample_id.strip():
        raise UnusableSampleError(sample_id, "id", "is empty, expected text")
    if len(sample_id) > MAX_ID or not sample_id.isprintable():
        shown = sample_id[:40]
        raise UnusableSampleError(shown, "id", f"is over {MAX_ID} characters or holds some that do not print")
    if sample_id.startswith(("/", "\\")) or ".." in sample_id.replace("\\", "/").split("/"):
        raise UnusableSampleError(sample_id, "id", "looks like a path to elsewhere")
