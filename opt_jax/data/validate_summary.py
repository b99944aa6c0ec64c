"""What `opt_jax.data.validate` found, for the terminal and for the page."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from opt_jax.data.triplet import Source
from opt_jax.data.validate_costs import costs
from opt_jax.data.validate_tally import CUTS, OTHERS, TRANSCRIBED, VOCABULARY, Tally
from opt_jax.evaluation.report_figures import duration

TOP = 20  # classes, speakers
FREQUENT = 0.01  # share of the captions from which on one of them is worth a warning
MOST_WORDS = 128


@dataclasses.dataclass
class Findings:
    """Everything that was found so far.

    Attributes:
      sources, chosen: by split, the source and the numbers of the rows to read. tally: of the rows read.
      captions: uint64, of all chosen rows after one another, see `Tally.captions`; 0 where not read yet.
      quick: files were not opened. problems: the first ones. stopped: why not all rows were read.
      took: seconds.
    """

    sources: Mapping[str, Source]
    chosen: Mapping[str, np.ndarray]
    tally: Tally
    captions: np.ndarray
    quick: bool = False
    problems: list = dataclasses.field(default_factory=list)
    stopped: str = ""
    took: float = 0.0

    @property
    def read(self) -> int:
        """Rows read so far; always the usable and the unusable ones together."""
        return sum(self.tally.rows.values())

    def add(self, part: Tally, first: int) -> None:
        """The rows that come next; `first` problems are kept."""
        self.captions[self.read : self.read + len(part.captions)] = part.captions
        self.problems += part.problems[: first - len(self.problems)]
        self.tally.update(part)

    def costs(self) -> list[dict]:
        """For all rows of the splits, see `validate_costs`; [] where no files were opened."""
        if self.quick or not self.tally.usable:
            return []
        factor = sum(map(len, self.sources.values())) / self.read
        return costs(self.tally, factor, self._captioned_training() / (factor * self.tally.usable))

    def _captioned_training(self) -> float:
        """How many rows of the training split have a caption, by those of them that were read."""
        if "train" not in self.chosen:
            return 0.0
        ends = dict(zip(self.chosen, itertools.accumulate(map(len, self.chosen.values())), strict=True))
        start = ends["train"] - len(self.chosen["train"])
        read = self.captions[start : min(ends["train"], self.read)]
        return len(self.sources["train"]) * float((read != 0).mean()) if len(read) else 0.0

    def frequent_captions(self, most: int = 5) -> tuple[int, list[tuple[str, int]]]:
        """How many captions differ (but for case and spaces), and those that occur most, more than once."""
        keys, first, counts = np.unique(self.captions, return_index=True, return_counts=True)
        first, counts = first[keys != 0], counts[keys != 0]
        best = np.lexsort((first, -counts))[:most]
        return len(counts), [(self._caption(first[i]), int(counts[i])) for i in best if counts[i] > 1]

    def _caption(self, position: int) -> str:
        for split, rows in self.chosen.items():
            if position < len(rows):
                return self.sources[split].caption(int(rows[position])) or ""
            position -= len(rows)
        raise IndexError(position)

    def counts(self) -> list[dict]:
        """Rows of each split and origin: {"split", "origin", "usable", "unusable"}."""
        places = dict.fromkeys((split, origin) for split, origin, _ in self.tally.rows)
        rows = self.tally.rows
        return [
            {"split": s, "origin": o, "usable": rows[s, o, True], "unusable": rows[s, o, False]}
            for s, o in places
        ]

    def lengths(self) -> list[dict]:
        """{"name", "note", "bars": [(name, count)]} of words, seconds and pixels, those there are."""
        named = (
            ("Words of a caption", self.tally.words, "words"),
            ("Seconds of a recording", self.tally.seconds, "s"),
            ("Longer side of a picture", self.tally.pixels, "pixels"),
        )
        found = []
        for name, lengths, unit in named:
            if lengths.total:
                mean = lengths.sum / lengths.total
                least, most, mean = (
                    f"{round(number, 2):,g}" for number in (lengths.least, lengths.most, mean)
                )
                note = f"{least} to {most} {unit}, {mean} on average"
                if lengths is self.tally.seconds:
                    note += f", {duration(lengths.sum)} in all"
                found.append({"name": name, "note": note, "bars": lengths.bars()})
        return found

    def warnings(self) -> list[str]:
        """What is no error, but worth knowing before hours are spent."""
        tally, found = self.tally, []
        found += [f"{split} has no rows" for split, source in self.sources.items() if not len(source)]
        for cut, variants in zip(CUTS, ("small", "base and large"), strict=True):
            if over := tally.seconds.above(cut):
                found.append(
                    f"recordings longer than {cut} s, which the {variants} variants cut off: {over:,}"
                )
        if over := tally.spoken["long"]:
            found.append(
                f"recordings longer than {TRANSCRIBED:g} s, of which wav2vec 2.0 learns no transcript where"
                f" it is trained on these data: {over:,}"
            )
        if other := tally.spoken["spelling"]:
            found.append(
                "spoken captions with digits or letters other than a to z, which wav2vec 2.0 leaves out where"
                f" it is trained on these data: {other:,}"
            )
        if over := tally.words.above(MOST_WORDS):
            found.append(f"captions of more than {MOST_WORDS} words, more than any variant takes: {over:,}")
        for caption, count in self.frequent_captions()[1]:
            if count > max(FREQUENT * tally.words.total, 10):
                share = 100 * count / tally.words.total
                found.append(f"{share:.1f} % of the captions are {shown(caption, 60)!r}")
        alone = sum(count for parts, count in tally.parts.items() if "+" not in parts)
        if alone and not self.quick:
            found.append(f"rows of one modality only, with which nothing can be matched: {alone:,}")
        return found


def shown(text: str, most: int = 200) -> str:
    """Text fit for a terminal: one line, nothing that moves the cursor, at most so many characters."""
    text = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def size(number: float) -> str:
    """Bytes as text: 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB"


def headline(found: Findings) -> str:
    """What all comes to, in one line: read = usable + unusable."""
    tally, total = found.tally, sum(map(len, found.chosen.values()))
    text = f"{found.read:,} rows = {tally.usable:,} usable + {tally.unusable:,} unusable"
    if found.stopped:
        text += f" of {total:,} ({found.stopped})"
    took = duration(found.took) if found.took >= 10 else f"{found.took:.1f} s"
    return text + f", in {took}" + (", without opening the files" if found.quick else "")


def lines(name: str, found: Findings) -> Iterator[str]:
    """The text for the terminal."""
    tally = found.tally
    yield f"{shown(name)}: {headline(found)}"
    yield ""
    for row in found.counts():
        bad = f", {row['unusable']:,} unusable" if row["unusable"] else ""
        yield f"  {row['split']:<11}{shown(row['origin'], 40):<20}{row['usable']:>12,} usable{bad}"
    if tally.parts:
        yield ""
    for parts, count in tally.parts.most_common():
        yield f"  {parts:<31}{count:>12,}"
    distinct, frequent = found.frequent_captions()
    if tally.words.total:
        words = (
            f"over {VOCABULARY:,}" if len(tally.vocabulary) >= VOCABULARY else f"{len(tally.vocabulary):,}"
        )
        yield f"  {'different captions':<31}{distinct:>12,}  of {words} different words"
    if frequent:
        yield from ("", "Most frequent captions:")
    for caption, count in frequent:
        yield f"  {count:>12,}  {shown(caption, 80)}"
    for lengths in found.lengths():
        yield from ("", f"{lengths['name']}: {lengths['note']}")
        most = max(count for _, count in lengths["bars"])
        for label, count in lengths["bars"]:
            yield f"  {label:>14} {count:>12,} {'#' * round(40 * count / most)}"
    for label, counts in (("Classes", tally.labels), ("Speakers", tally.speakers), ("Sizes", tally.sizes)):
        if counts:
            yield from ("", f"{label}: {len(counts):,}{'+' * (OTHERS in counts)}")
            top = counts.most_common(5 if counts is tally.sizes else TOP)
            yield "  " + ", ".join(f"{shown(key, 40)} {count:,}" for key, count in top)
    yield from _cost_lines(found)
    yield from _problem_lines(found)


def _cost_lines(found: Findings) -> Iterator[str]:
    if estimates := found.costs():
        yield from ("", "Features of all rows, estimated; time on two CPU cores, a GPU takes far less:")
        for e in estimates:
            yield f"  {e['name']:<15}{size(e['bytes']):>9}{duration(e['seconds']):>15}   {e['assumption']}"


def _problem_lines(found: Findings) -> Iterator[str]:
    if warnings := found.warnings():
        yield from ("", "Worth knowing:", *(f"  {warning}" for warning in warnings))
    if not found.tally.unusable:
        return
    yield from ("", f"Unusable: {found.tally.unusable:,} rows")
    for (part, kind), count in found.tally.kinds.most_common(TOP):
        yield f"  {count:>12,}  {part}: {shown(kind, 120)}"
    yield from ("", f"The first {len(found.problems)}:")
    for problem in found.problems:
        place = f"{problem['split']} row {problem['row']}"
        if problem["list_row"] != problem["row"]:
            place += f", {problem['list_row']} of its list"
        name = f"{shown(problem['id'], 60)}, {shown(problem['origin'], 40)}"
        yield f"  {place} ({name}): {problem['part']} {shown(problem['reason'])}"
