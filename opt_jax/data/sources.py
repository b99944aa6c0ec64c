"""Opens sources by name: `python -m opt_jax.data.validate SOURCE`, `--config.data.manifest=SOURCE` in
pre-training, `--config.data.source=SOURCE` in fine-tuning.

    SOURCE = PART [+ PART ...]      PART = [KIND:]PATH[,OPTION=VALUE ...]

    data/mine                         a folder with train.jsonl, validation.jsonl and test.jsonl (or .csv)
    data/all.csv,hold_out=500         one list; 500 rows each become validation and test
    data/{split}/*.tar                tar shards
    coco_captions:captions_train2017.json,images=coco/train2017,hold_out=5000,weight=2 + data/mine
    karpathy:dataset_flickr30k.json,images=flickr30k
    librispeech:LibriSpeech/{split},train=train-clean-100,validation=dev-clean,test=test-clean
    vqa:questions_{split}.json,annotations=annotations_{split}.json,images=coco,validation=val,test=val

`{split}` becomes train, validation or test, or what an option of that name says (`validation=val`); a part
without it is one list, of which rows are held out, those of one picture together. `weight` is how often
training visits a row of this part in an epoch, on average. Without KIND a file that ends in .tar is tar
shards, all else a manifest. The options of each kind are those of its class, see `KINDS`.
"""

import glob
import importlib
import inspect
from pathlib import Path

import numpy as np

from opt_jax.data.mixture import Mixture, Part
from opt_jax.data.triplet import Source, SourceError

SPLITS = ("train", "validation", "test")
KINDS = {
    "manifest": "opt_jax.data.manifest:Manifest",
    "tar": "opt_jax.data.tar_shards:TarShards",
    "localized_narratives": "opt_jax.data.localized_narratives:LocalizedNarratives",
    "conceptual_captions": "opt_jax.data.pairs:ConceptualCaptions",
    "coco_captions": "opt_jax.data.pairs:CocoCaptions",
    "visual_genome": "opt_jax.data.pairs:VisualGenome",
    "karpathy": "opt_jax.data.karpathy:Karpathy",
    "librispeech": "opt_jax.data.librispeech:LibriSpeech",
    "open_images_labels": "opt_jax.data.open_images_labels:OpenImagesLabels",
    "region_npz": "opt_jax.data.region_features:RegionFiles",
    "region_tsv": "opt_jax.data.region_features:RegionTable",
    "tfds": "opt_jax.data.tfds_source:TfdsSource",
    "vqa": "opt_jax.data.vqa:VQA",
}
MOST_WEIGHT = 10_000
HOLD_OUT = 5000  # rows of test and of validation where a list has no splits of its own (the paper's number)


def open_splits(spec: str, splits=SPLITS) -> dict[str, Source]:
    """The splits of a source; the classes are those of its training split. Raises SourceError."""
    lists: dict[str, Source] = {}
    train = open_split(spec, "train", lists=lists)
    names = train.class_names
    others = {split: open_split(spec, split, names, lists) for split in splits if split != "train"}
    return {split: others.get(split, train) for split in splits}


def open_split(spec: str, split: str, class_names=None, lists: dict[str, Source] | None = None) -> Source:
    """One split of a source, see above.

    Args:
      class_names: of the training split. lists: those without splits that are open already, by the text of
        their part; others are added.

    Raises SourceError.
    """
    lists = {} if lists is None else lists
    if split not in SPLITS:
        raise SourceError(f"split {split!r}; there are {', '.join(SPLITS)}")
    parts = [part.strip() for part in spec.split(" + ")]
    opened, weights = zip(*(_open_part(part, split, class_names, lists) for part in parts), strict=True)
    return opened[0] if len(opened) == 1 and weights == (1.0,) else Mixture(opened, weights)


def _open_part(part: str, split: str, class_names, lists: dict[str, Source]) -> tuple[Source, float]:
    kind, path, options = parse(part)
    weight, hold_out = options.pop("weight", "1"), options.pop("hold_out", None)
    if kind in ("tfds", "karpathy"):  # which have splits of their own
        options.setdefault("split", "{split}")
    name = options.get(split, split)
    own_splits = "{split}" in f"{path} {options}" or (kind == "manifest" and Path(path).is_dir())
    if not own_splits and set(SPLITS) & set(options):
        raise SourceError(f"{part!r} names splits, but has no {{split}} for their names to stand in")
    options = {key: value.replace("{split}", name) for key, value in options.items() if key not in SPLITS}
    path = path.replace("{split}", name)
    if kind == "manifest" and Path(path).is_dir():
        path = _manifest_of(Path(path), split)
    weight, hold_out = _number(part, "weight", weight, float), _number(part, "hold_out", hold_out, int)
    if weight is None or not 0 < weight <= MOST_WEIGHT:
        raise SourceError(f"{part!r}: weight must be above 0, and at most {MOST_WEIGHT}")
    if own_splits and hold_out is not None:
        raise SourceError(f"{part!r} has splits of its own; leave hold_out out")
    if own_splits:
        return _construct(kind, path, options, class_names), weight
    if part not in lists:
        lists[part] = _construct(kind, path, options, class_names)
    return held_out(lists[part], split, hold_out), weight


def _number(part: str, option: str, text: str | None, kind: type):
    try:
        return None if text is None else kind(text)
    except ValueError as error:
        raise SourceError(f"{part!r}: {option} is {text!r}, expected a number") from error


def parse(part: str) -> tuple[str, str, dict[str, str]]:
    """(kind, path, options) of one part. Raises SourceError."""
    head, *pairs = part.split(",")
    options = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if len(options) != len(pairs):
        raise SourceError(f"{part!r}: after the path come options such as weight=2, found {pairs}")
    kind, colon, path = head.partition(":")
    if not colon:
        kind, path = ("tar" if head.endswith(".tar") else "manifest"), head
    if kind not in KINDS:
        raise SourceError(f"{part!r}: there is no kind {kind!r}; choose from {', '.join(KINDS)}")
    if not path:
        raise SourceError(f"{part!r} names no path")
    return kind, path, options


def _construct(kind: str, path: str, options: dict[str, str], class_names) -> Source:
    module, name = KINDS[kind].split(":")
    constructor = getattr(importlib.import_module(module), name)
    parameters = dict(inspect.signature(constructor).parameters)
    known = set(parameters) - {"path", "paths", "class_names"}
    if unknown := sorted(set(options) - known):
        raise SourceError(
            f"{kind} has no option {', '.join(unknown)}; it has"
            f" {', '.join(sorted(known | {'weight', 'hold_out', *SPLITS}))}"
        )
    needed = {option for option in known if parameters[option].default is inspect.Parameter.empty}
    if missing := sorted(needed - set(options)):
        raise SourceError(
            f"{kind}:{path} needs the option {missing[0]}, as in {kind}:{path},{missing[0]}=..."
        )
    if kind == "tar":
        paths = sorted(glob.glob(path))
        if not paths:
            raise SourceError(f"no file is called {path}")
        path = paths
    source = constructor(path, class_names=class_names, **options)
    if not len(source):
        raise SourceError(f"{kind}:{path} holds no rows")
    return source


def _manifest_of(folder: Path, split: str) -> Path:
    names = [f"{split}{suffix}" for suffix in (".jsonl", ".csv", ".tsv", ".json")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise SourceError(f"{folder} holds none of {', '.join(names)}; name one file, or make these")


def held_out(source: Source, split: str, rows: int | None) -> Source:
    """The part of a list without splits that is `split`.

    Pictures are drawn by a fixed seed, with all their rows, until these are at least `rows` (by default
    5,000, at most a tenth of the list), first for test and then for validation; the rest is for training.
    Unusable rows go with training.
    """
    count = len(source)
    rows = min(HOLD_OUT, count // 10) if rows is None else rows
    pictures = getattr(source, "groups", np.arange(1, count + 1))
    # In the order of their first rows: the draw must not depend on how the names happen to be hashed.
    _, first, number, size = np.unique(pictures, return_index=True, return_inverse=True, return_counts=True)
    order = np.random.default_rng(0).permutation(len(first))
    drawn = np.argsort(first)[order]
    drawn = drawn[pictures[first[drawn]] != 0]
    ends, start = [], 0
    for _ in range(2 if rows > 0 else 0):
        start += np.searchsorted(np.cumsum(size[drawn[start:]]), rows) + 1
        ends.append(start)
    if rows < 0 or start >= max(len(drawn), 1):
        raise SourceError(f"hold_out={rows} twice does not fit {count} rows of {len(drawn)} pictures")
    parts = dict(zip(("test", "validation", "train"), np.split(drawn, ends or [0, 0]), strict=True))
    parts["train"] = np.append(parts["train"], np.flatnonzero(pictures[first] == 0))
    return Part(source, np.flatnonzero(np.isin(number, parts[split])), split)
