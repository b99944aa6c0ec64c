"""Looking through a source: every row is counted once, and nothing in it does harm."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from PIL import Image
from raw_files import BAD_PICTURES, file_of, picture, sound, tone

from opt_jax.data import validate as validate_module
from opt_jax.data.sources import open_split
from opt_jax.data.triplet import Triplet
from opt_jax.data.validate import main, validate
from opt_jax.data.validate_summary import shown, size
from opt_jax.data.validate_tally import SECONDS, Histogram, Tally

SCRIPT = "<script>alert('1')</script> & \x1b[31mred"


def write(folder, rows, name="train.jsonl"):
    (folder / name).write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))


def row(number: int, **fields) -> dict:
    fields = {"image": "a.png", "audio": "a.wav", "caption": f"Ball number {number}."} | fields
    return {"id": f"r{number}"} | {name: value for name, value in fields.items() if value is not None}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(file_of(picture(30, 20)))
    (tmp_path / "a.wav").write_bytes(sound(tone(0.5), 16_000))
    return tmp_path


@pytest.fixture
def broken(folder):
    """40 rows of which 7 are unusable: where and in which part."""
    rows = [row(i, labels=["ball", "red" if i % 2 else "blue"], speaker=f"s{i % 3}") for i in range(40)]
    (folder / "empty.wav").write_bytes(b"")
    (folder / "cut.jpg").write_bytes(BAD_PICTURES["truncated.jpg"][0])
    rows[3] |= {"image": "missing.png"}
    rows[5] |= {"audio": "empty.wav"}
    rows[8] |= {"id": "r7"}
    rows[11] |= {"caption": "nul \0 here"}
    rows[12] |= {"image": "cut.jpg"}
    rows[20] = "{broken"
    rows[21] = json.dumps({"id": "sur\ud800", "caption": "x"})
    rows[30] |= {"caption": SCRIPT}
    write(folder, rows)
    return folder, {
        3: "image",
        5: "audio",
        8: "id",
        11: "caption",
        12: "image",
        20: "row",
        21: "id",
    }


@pytest.mark.parametrize("processes", [1, 2])
def test_every_bad_row_is_named_and_every_row_counted_once(broken, processes, capsys):
    folder, expected = broken
    problems = folder / "problems.jsonl"
    arguments = [str(folder), "--split=train", f"--problems={problems}", f"--processes={processes}"]
    assert main(arguments) == 1
    found = [json.loads(line) for line in problems.read_text().splitlines()]
    assert {problem["row"]: problem["part"] for problem in found} == expected
    assert [problem["row"] for problem in found] == sorted(expected)
    assert found[0]["id"] == "r3" and "'missing.png' cannot be read" in found[0]["reason"]
    assert {problem["origin"] for problem in found} == {"manifest"}
    text = capsys.readouterr().out
    assert "40 rows = 33 usable + 7 unusable" in text
    assert "train row 5 (r5, manifest): audio file is empty" in text
    assert "\x1b" not in text and "\0" not in text
    assert re.search(r"text \+ image \+ audio +33\n", text)
    usable = sorted(set(range(40)) - set(expected))
    assert f"ball 33, blue {sum(i % 2 == 0 for i in usable)}, red {sum(i % 2 for i in usable)}" in text


def test_tallies_of_parts_add_up_to_that_of_all(broken):
    folder, _ = broken
    source = {"train": open_split(str(folder), "train")}
    one, many = validate(source, processes=1), Tally()
    validate_module._start(source)
    whole = validate_module._read("train", np.arange(40), False)
    for rows in np.array_split(np.arange(40), 7):
        many.update(validate_module._read("train", rows, False))
    for name in ("rows", "parts", "labels", "speakers", "sizes", "kinds", "vocabulary", "samples", "text"):
        assert getattr(one.tally, name) == getattr(many, name) == getattr(whole, name), name
    assert one.captions.tolist() == whole.captions
    assert one.tally.seconds.counts == whole.seconds.counts and whole.seconds.total == 33
    assert len(whole.samples) == 24  # of 33
    assert one.tally.within.keys() == whole.within.keys() and whole.within[5.12] == pytest.approx(33 * 0.5)


def test_a_good_source_and_what_is_in_it(folder, capsys):
    (folder / "long.wav").write_bytes(sound(tone(21, 8000), 8000))
    rows = [
        row(0),
        row(1, image=None),
        row(2, audio=None),
        row(3, caption="  a  PHOTO "),
        row(4, audio="long.wav"),
    ]
    rows += [row(5 + i, caption="A photo", image=None, audio=None) for i in range(20)]
    for split in ("train", "validation", "test"):
        write(folder, rows if split == "train" else rows[:1], f"{split}.jsonl")
    assert main([str(folder)]) == 0
    text = capsys.readouterr().out
    assert "27 rows = 27 usable + 0 unusable" in text
    assert re.search(r"train +manifest +25 usable\n +validation +manifest +1 usable\n", text)
    for parts, count in {"text + image + audio": 5, "text + audio": 1, "text + image": 1, "text": 20}.items():
        assert re.search(rf"^  {re.escape(parts)} +{count}$", text, re.M)
    # "Ball number 0." thrice, 1, 2, 4 and the photos, which case and spaces do not make different.
    assert re.search(r"different captions +5  of 8 different words", text)
    assert re.search(r"^ +21  +a  PHOTO $", text, re.M)
    assert (
        "0.5 to 21 s" in text
        and "recordings longer than 5.12 s, which the small variants cut off: 1" in text
    )
    assert "30.72 s, which" not in text
    assert "77.8 % of the captions are '  a  PHOTO '" in text
    assert "rows of one modality only, with which nothing can be matched: 20" in text
    assert "30 x 20 6" in text


def test_quick_opens_no_files(folder, capsys):
    rows = [row(i, image=f"not/there/{i}.png") for i in range(30)]
    rows[4] |= {"id": "r3"}
    rows[5] |= {"caption": ""}
    write(folder, rows)
    assert main([str(folder), "--split=train", "--quick"]) == 1
    text = capsys.readouterr().out
    assert "30 rows = 28 usable + 2 unusable" in text and "without opening the files" in text
    assert (
        re.search(r"text \+ image \+ audio +28\n", text)
        and "Seconds of" not in text
        and "estimated" not in text
    )
    assert main([str(folder), "--split=train"]) == 1
    assert "30 rows = 0 usable + 30 unusable" in capsys.readouterr().out


def test_rows_of_a_list_without_splits_are_named_by_their_place_in_it(folder):
    rows = [row(i, image=None) for i in range(50)]
    rows[33] |= {"audio": "missing.wav"}
    write(folder, rows, "all.jsonl")
    spec = f"{folder / 'all.jsonl'},hold_out=20"
    found = validate(
        {split: open_split(spec, split) for split in ("train", "validation", "test")}, processes=1
    )
    assert found.tally.usable == 49
    (problem,) = found.problems
    assert problem["list_row"] == 33 and problem["id"] == "r33"
    part = open_split(spec, problem["split"])
    assert part.rows[problem["row"]] == 33


def test_quick_knows_the_parts_of_mixtures(folder):
    write(folder, [row(0), row(1, audio=None)], "one.jsonl")
    write(folder, [row(i, image=None) for i in range(20)], "two.jsonl")
    spec = f"{folder / 'one.jsonl'},hold_out=0 + {folder / 'two.jsonl'},hold_out=2,weight=2"
    found = validate({"train": open_split(spec, "train")}, quick=True, processes=1)
    assert found.tally.parts == {"text + image + audio": 1, "text + image": 1, "text + audio": 16}
    assert [(place["origin"], place["usable"]) for place in found.counts()] == [
        ("0:manifest", 2),
        ("1:manifest", 16),
    ]


def test_some_rows_only_are_the_same_each_time_and_costs_are_for_all(folder):
    write(folder, [row(i) for i in range(200)])
    source = {"train": open_split(str(folder), "train")}
    first, second = (validate(source, rows=20, processes=1) for _ in range(2))
    assert first.read == 20 and len(set(first.chosen["train"])) == 20
    np.testing.assert_array_equal(first.chosen["train"], second.chosen["train"])
    whole = validate(source, processes=1)
    for some, all_of_it in zip(first.costs(), whole.costs(), strict=True):
        assert some["seconds"] == pytest.approx(all_of_it["seconds"])
        assert some["bytes"] == pytest.approx(all_of_it["bytes"], rel=0.01)


def test_no_list_is_overwritten(broken, capsys):
    folder = broken[0]
    before = (folder / "train.jsonl").read_bytes()
    for flag in ("--problems", "--page"):
        for path in (folder / "train.jsonl", folder):
            with pytest.raises(SystemExit):
                main([str(folder), f"{flag}={path}"])
            assert "exists and was not made by this program" in capsys.readouterr().err
    assert (folder / "train.jsonl").read_bytes() == before
    flags = [str(folder), "--split=train", "--processes=1", "--quick"]
    made = [f"--page={folder / 'page.html'}", f"--problems={folder / 'problems.jsonl'}"]
    assert main([*flags, *made]) == main([*flags, *made])  # its own it writes again


def test_what_wav2vec2_would_not_learn_is_told(tmp_path, capsys):
    captions = ("Ein Ball.", "Gr\u00fc\u00dfe", "A ball", "It is 5")
    rows = [{"id": str(n), "caption": text, "audio": f"{n}.wav"} for n, text in enumerate(captions)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for n in range(4):
        soundfile.write(tmp_path / f"{n}.wav", np.resize(tone(), 16_000 * (6 if n == 0 else 1)), 16_000)
    assert main([str(tmp_path), "--split=train", "--processes=1"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"longer than 5 s, of which wav2vec 2.0 learns no transcript.*: 1\b", told)
    assert re.search(r"letters other than a to z, which wav2vec 2.0 leaves out.*: 2\b", told)


def test_the_page_is_one_file_and_holds_no_foreign_tags(broken):
    folder, expected = broken
    assert main([str(folder), "--split=train", f"--page={folder / 'page.html'}", "--processes=1"]) == 1
    page = (folder / "page.html").read_text()
    assert (
        "<script" not in page and "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt; &amp; \\x1b[31mred" in page
    )
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "\x1b" not in page and "\0" not in page
    assert page.count("<article") == 24 + len(expected)
    assert page.count('class="sample broken"') == len(expected)
    assert "sur\\ud800" in page  # and it could be written
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert Image.open(io.BytesIO(base64.b64decode(pictures[0]))).size == (30, 20)
    samples, rate = soundfile.read(
        io.BytesIO(base64.b64decode(re.findall(r"data:audio/mpeg;base64,([^\"]+)", page)[0]))
    )
    assert rate == 16_000 and 0.4 < len(samples) / rate < 0.7 and np.abs(samples).max() > 0.3


def test_large_pictures_and_long_recordings_are_made_small_for_the_page(folder):
    Image.new("RGB", (3000, 1000), "red").save(folder / "wide.png")
    (folder / "long.wav").write_bytes(sound(tone(30, 8000), 8000))
    write(folder, [row(0, image="wide.png", audio="long.wav")])
    main([str(folder), "--split=train", f"--page={folder / 'page.html'}", "--processes=1"])
    page = (folder / "page.html").read_text()
    (content,) = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (320, 107)
    (content,) = re.findall(r"data:audio/mpeg;base64,([^\"]+)", page)
    assert len(soundfile.read(io.BytesIO(base64.b64decode(content)))[0]) / 16_000 == pytest.approx(
        10, abs=0.2
    )


def test_what_cannot_be_opened_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "nothing.jsonl")]) == 2
    write(tmp_path, [], "empty.jsonl")
    assert main([str(tmp_path / "empty.jsonl"), "--split=train"]) == 2
    first, second = capsys.readouterr().err.strip().splitlines()
    assert "nothing.jsonl cannot be read" in first and "holds no rows" in second
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), f"--page={tmp_path / 'no' / 'page.html'}"])


class Odd:
    """100 rows of which one does what no row should."""

    class_names = ()
    modalities = ("text",)

    def __init__(self, act):
        self.act = act

    def __len__(self):
        return 100

    def read(self, index, image=True, audio=True):
        if index == 70:
            self.act()
        return Triplet(str(index), caption=f"Number {index}", references=(f"Number {index}",))

    __getitem__ = read

    def caption(self, index):
        return f"Number {index}"

    def origin(self, index):
        return "odd"


def interrupt():
    raise KeyboardInterrupt


def interrupt_this_process():
    os.kill(os.getpid(), signal.SIGINT)


def interrupt_the_first_process():
    os.kill(os.getppid(), signal.SIGINT)


def fail():
    raise TypeError("no such thing")


def die():
    os._exit(9)


def test_stopping_keeps_what_was_found_so_far():
    found = validate({"train": Odd(interrupt)}, processes=1)
    assert found.stopped == "interrupted" and 50 < found.read <= 70
    assert found.tally.usable == found.read and found.frequent_captions()[0] == found.read


def test_stopping_several_processes():
    # A terminal sends Ctrl-C to all of them: those that read go on until the first one ends them.
    found = validate({"train": Odd(interrupt_this_process)}, processes=2)
    assert not found.stopped and found.tally.usable == 100
    found = validate({"train": Odd(interrupt_the_first_process)}, processes=2)
    assert found.stopped == "interrupted" and found.read == found.tally.usable


def test_an_error_that_no_source_should_raise_costs_one_row():
    found = validate({"train": Odd(fail)}, processes=1)
    assert found.tally.usable == 99 and not found.stopped
    (problem,) = found.problems
    assert problem["row"] == 70 and problem["reason"] == "raises TypeError: no such thing"


def test_a_process_that_dies_ends_the_reading():
    found = validate({"train": Odd(die)}, processes=2)
    assert "died" in found.stopped and found.read < 100


def test_histograms_include_their_upper_edges():
    lengths = Histogram(SECONDS)
    for value in (5.12, 5.1201, 0.1, 5000.0):
        lengths.add(value)
    assert lengths.above(5.12) == 2 and lengths.above(30.72) == 1 and lengths.total == 4
    bars = dict(lengths.bars())
    assert bars["up to 5.12"] == 1 and bars["up to 8"] == 1 and bars["over 1,800"] == 1
    assert list(bars)[0] == "up to 0.25" and sum(bars.values()) == 4
    assert Histogram(SECONDS).bars() == []


def test_copies_are_those_of_training_rows_with_captions(folder, capsys):
    for split, count in (("train", 30), ("validation", 10), ("test", 10)):
        rows = [row(i, **({"caption": None} if i % 3 == 0 else {})) for i in range(count)]
        write(folder, rows, f"{split}.jsonl")
    sources = {split: open_split(str(folder), split) for split in ("test", "train", "validation")}
    found = validate(sources, processes=1)
    small, grid, _ = found.costs()
    seconds = 0.5 * 0.0025 + 0.0002
    assert small["seconds"] == pytest.approx(50 * (0.006 + seconds))
    assert grid["seconds"] == pytest.approx((50 + 3 * 20) * (0.0145 + seconds))
    some = validate(sources, rows=9, processes=1).costs()
    assert some[1]["seconds"] == pytest.approx(grid["seconds"], rel=0.15)
    test = {"test": sources["test"]}
    assert validate(test, processes=1).costs()[1]["seconds"] == pytest.approx(10 * (0.0145 + seconds))


def test_text_for_a_terminal():
    assert shown("a\x1b[2Jb\n\ud800 é") == "a\\x1b[2Jb\\n\\ud800 é"
    assert shown("x" * 300, 10) == "x" * 9 + "…"
    assert (size(0), size(999), size(1_230_000), size(5e15)) == ("0 B", "999 B", "1.23 MB", "5e+03 TB")


def test_reasons_of_megabytes_are_cut(folder):
    write(folder, [row(0), row(1, image="x" * 5_000_000), row(2, image=None, audio="y" * 5_000_000)])
    found = validate({"train": open_split(str(folder), "train")}, processes=1)
    assert found.tally.unusable == 2 and all(len(json.dumps(p)) < 2000 for p in found.problems)
    assert all(len(kind) < 200 for _, kind in found.tally.kinds)


def test_it_starts_without_the_heavy_libraries():
    heavy = "{'jax', 'torch', 'tensorflow', 'flax'}"
    modules = "opt_jax.data.validate, opt_jax.data.validate_page"
    command = [sys.executable, "-c", f"import sys, {modules}; print({heavy} & set(sys.modules))"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"
