import json
import re
import wave
from html.parser import HTMLParser

import pytest

from opt_jax.evaluation.report import write_report

PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)
ATTACK = "<script>alert('x')</script>"


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of style sheets."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self._open = [], "", None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open = tag

    def handle_data(self, data):
        if self._open != "style":
            self.text += data + " "

    def sources(self):
        return [
            v for _, attributes in self.tags for k, v in attributes.items() if k in ("src", "href", "data")
        ]


@pytest.fixture
def run(tmp_path):
    media = tmp_path / "evaluation" / "media"
    media.mkdir(parents=True)
    (media / "a.png").write_bytes(PNG)
    with wave.open(str(media / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(bytes(320))
    (tmp_path / "secret.png").write_bytes(PNG + b"secret")
    results = {
        "retrieval/pool": 40,
        "retrieval/text_to_image/R@1": 71.25,
        "retrieval/text_to_image/R@1_standard_error": 1.5,
        "retrieval/text_to_image/R@5": None,
        "retrieval_matching/text_to_image/R@1": 5.5,
        "speech_recognition/audio/WER": 14.5,
        "captioning/image/CIDEr": 120.5,
        "classification/I/mAP": 70.5,
        "classification/T/mAP": 60.5,
        "classification/T+I+A/mAP": 81.5,
        "classification/chance/mAP": 9.75,
        "text_to_image/code_accuracy": 43.5,
        "text_to_image/code_majority": 21.5,
        "encoders/dvae/PSNR": 27.25,
        "seconds/evaluation": 25.0,
        "seconds/encoders/dvae": 50.0,
        "seconds/pretrain": 600.0,
        "triplets/train": 8000,
        "something/else": 12.125,
    }
    examples = {
        "retrieval": [
            {
                "direction": "text_to_image",
                "query": {"text": ATTACK, "audio": "media/a.wav"},
                "results": [
                    {"image": "media/a.png", "score": 1.0, "correct": False},
                    {"image": "../secret.png", "score": 0.5, "correct": True},
                ],
            },
            {
                "direction": "image_to_text",
                "query": {"image": "media/a.png"},
                "results": [{"text": "no", "score": 1}],
            },
        ],
        "captions": [
            {"image": "media/a.png", "references": ["a red dog", "two cats"], "from_image": "a red cat"}
        ],
        "transcripts": [
            {"audio": "media/a.wav", "truth": "big dog", "from_audio": "", "from_audio_image": "big dog"}
        ],
        "generated": [{"text": "a dog", "real": "media/a.png", "generated": ["media/a.png"]}],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "config.json").write_text(json.dumps({"variant": "tiny", "note": ATTACK}))
    (tmp_path / "evaluation" / "examples.json").write_text(json.dumps(examples))
    (tmp_path / "pretrain").mkdir()
    lines = [
        {
            "name": "pretrain",
            "step": s,
            "total": 9.0 - s,
            "mlm": None if s == 2 else 5.0,
            "learning_rate": 1e-3,
        }
        for s in range(1, 5)
    ] + [{"name": "pretrain", "step": 4, "validation/total": 5.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "encoders" / "dvae").mkdir(parents=True)
    (tmp_path / "encoders" / "dvae" / "before_after.png").write_bytes(PNG)
    (tmp_path / "encoders" / "dvae" / "metrics.jsonl").write_text(
        '{"name": "dvae", "step": 3, "total": 0.5}\n'
    )
    return tmp_path


def test_one_file_that_loads_nothing_and_runs_nothing(run):
    page = Page(write_report(run).read_text())
    assert page.sources() and all(source.startswith("data:") for source in page.sources())
    assert not {"script", "iframe", "object", "link"} & {tag for tag, _ in page.tags}
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert page.text.count(ATTACK) == 2  # the query and the configuration, as text


def test_media_are_inlined_and_nothing_outside_is_read(run):
    html = write_report(run).read_text()
    page = Page(html)
    assert sum(source.startswith("data:audio/wav") for source in page.sources()) == 2
    assert sum(source.startswith("data:image/png") for source in page.sources()) == 6
    assert "../secret.png: outside evaluation/" in page.text
    assert "c2VjcmV0" not in html  # "secret"


def test_figures_stand_beside_chance(run):
    text = " ".join(Page(write_report(run).read_text()).text.split())
    assert "trained on 8,000 triplets" in text and "for 4 steps" in text and "took 11 min 15 s" in text
    assert "Text → image 71.2 ±1.5 – – 5.5" in text
    assert "Chance, k / pool 2.5 12.5 25.0 2.5" in text
    assert "T 60.5 I 70.5 T+I+A 81.5 Chance 9.8" in text
    assert "teacher-forced top-1 43.5 majority code of the cell 21.5" in text
    assert "PSNR 27.25" in text
    assert "dvae 50 s pretrain 10 min evaluation 25 s" in text
    assert "something/else 12.125" in text


def test_labels_are_marked_where_they_are_wrong_or_missing(run):
    found = [{"inputs": "I", "labels": {"red ring": 0.974, "blue star": 0.6}}, {"inputs": "T", "labels": {}}]
    example = {"image": "media/a.png", "truths": ["red ring", ATTACK], "found": found}
    (run / "evaluation" / "examples.json").write_text(json.dumps({"labels": [example]}))
    html = write_report(run).read_text()
    assert f"I red ring 97 , blue star 60 {ATTACK} T red ring {ATTACK}" in " ".join(Page(html).text.split())
    assert "red ring <small>97</small>" in html and "<ins>blue star</ins> <small>60</small>" in html
    assert html.count("<del>red ring</del>") == 1 and html.count("<del>&lt;script") == 2


def test_questions_have_their_tables_and_examples(run):
    path = run / "results.json"
    results = json.loads(path.read_text())
    figures = {"T+I/accuracy": 81.5, "T+I/accuracy_written": 71.5, "I+A/accuracy": 61.5, "T/accuracy": 31.5}
    figures |= {"T+I/accuracy_what_color": 91.5, "T/accuracy_what_color": 11.5}
    figures |= {"most_frequent/accuracy": 21.5, "T+I/accuracy_written_what_color": 1.5}
    results |= {f"question_answering/{key}": value for key, value in figures.items()}
    path.write_text(json.dumps(results))
    path = run / "evaluation" / "examples.json"
    answers = [{"inputs": "T+I", "chosen": "red", "written": "reddish"}]
    answers.append({"inputs": "I+A", "chosen": "blue", "written": "blue"})
    asked = {"text": ATTACK, "image": "media/a.png", "audio": "media/a.wav"}
    path.write_text(json.dumps({"questions": [asked | {"answers": answers, "truths": ["red", "dark red"]}]}))
    page = Page(write_report(run).read_text())
    text = " ".join(page.text.split())
    assert "chosen written T+I 81.5 71.5 I+A 61.5 – T 31.5 – Most frequent answer 21.5 –" in text
    assert "Answers chosen, by kind of question T+I I+A T what color 91.5 – 11.5" in text
    assert "Answers written, by kind of question T+I I+A T what color 1.5 – –" in text
    assert "question_answering" not in text  # in no list of other figures either
    assert "Questions answered, VQA accuracy 81.5 written 71.5" in text
    assert "T+I red ✓ written: reddish I+A blue truth red, dark red" in text
    assert page.text.count(ATTACK) == 2 and {"img", "audio"} <= {tag for tag, _ in page.tags}
    assert sum(source.startswith("data:audio/wav") for source in page.sources()) == 1


def test_queries_are_told_apart_by_their_captions_where_results_do(run):
    path = run / "results.json"
    results = json.loads(path.read_text())
    results |= {"retrieval/text_to_image/R@1_seen": 91.25, "retrieval/text_to_image/R@1_unseen": 31.75}
    results |= {"retrieval/image_to_text/R@1": 61.5}
    path.write_text(json.dumps(results))
    text = " ".join(Page(write_report(run).read_text()).text.split())
    assert "R@1 R@5 R@10 R@1, seen R@1, unseen R@1" in text
    assert "Best combination By whether training has seen the query's caption Matching" in text
    assert "Text → image 71.2 ±1.5 – – 91.2 31.8 5.5" in text
    assert "Image → text 61.5 – – – – –" in text
    assert "Chance, k / pool 2.5 12.5 25.0 2.5 2.5 2.5" in text


def test_the_labels_of_the_headline_are_read_off_pictures_where_there_are_any(run):
    text = " ".join(Page(write_report(run).read_text()).text.split())
    assert "Labels mAP, picture alone 70.5 chance 9.8" in text
    path = run / "results.json"
    results = json.loads(path.read_text())
    del results["classification/I/mAP"]
    path.write_text(json.dumps(results))
    text = " ".join(Page(write_report(run).read_text()).text.split())
    assert "Labels mAP, text + picture + speech 81.5 chance 9.8" in text


def test_examples_show_what_is_correct_and_where_words_differ(run):
    html = write_report(run).read_text()
    page = Page(html)
    text = " ".join(page.text.split())
    assert [a["class"] for tag, a in page.tags if tag == "li" and a.get("class") in ("correct", "wrong")] == [
        "wrong",
        "correct",
        "wrong",
    ]
    assert text.count("The correct one is not among the first") == 1
    assert re.search(r"a red\s+<del>dog</del>\s+<ins>cat</ins>", html)
    assert "big dog nothing said" in text
    assert "a dog real from text" in text


def test_what_pictures_are_drawn_from_is_told(run):
    drawn = {"generated": ["media/a.png", "media/a.png"], "drawn_from": ["speech", "both"]}
    (run / "evaluation" / "examples.json").write_text(json.dumps({"generated": [drawn]}))
    assert "from speech from both" in " ".join(Page(write_report(run).read_text()).text.split())


def test_curves_of_pretraining_and_encoders(run):
    html = write_report(run).read_text()
    plots = re.findall(r"<svg.*?</svg>", html)
    titles = [re.search("<title>(.*)</title>", plot)[1] for plot in plots]
    assert titles == ["total", "mlm", "learning_rate", "total"]
    assert [plot.count("class='validation'") for plot in plots] == [1, 0, 0, 0]


def test_an_empty_run_still_gives_a_page_and_no_run_is_an_error(tmp_path):
    assert "A model" in Page(write_report(tmp_path).read_text()).text
    with pytest.raises(ValueError, match="not a directory"):
        write_report(tmp_path / "nowhere")


def test_files_in_another_format_are_named(tmp_path):
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"results\.json must hold a JSON object, found list"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results\.json is not JSON"):
        write_report(tmp_path)
    (tmp_path / "results.json").unlink()
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "examples.json").write_text('{"captions": ["text"]}')
    with pytest.raises(ValueError, match="'captions' must be a list of objects"):
        write_report(tmp_path)
