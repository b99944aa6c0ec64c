"""References of written texts: judged before anything is trained, and counted as the configuration asks."""

import dataclasses
import json

import pytest
from test_finetuning import smallest_task

from opt_jax import finetuning, pipeline
from opt_jax.evaluation import pretrained as evaluation
from opt_jax.evaluation.captioning import caption_scores
from opt_jax.evaluation.cider import document_frequencies
from opt_jax.tasks.input_sets import InputSetError
from opt_jax.trained import load_trained


class Changed:
    """A source with the text of one of its samples replaced."""

    def __init__(self, source, row, text):
        self.source, self.row, self.text = source, row, text

    def read(self, index, image=True, audio=True):
        triplet = self.source.read(index, image=image, audio=audio)
        if index != self.row:
            return triplet
        references = (*triplet.references[:1], self.text)
        return dataclasses.replace(triplet, id="odd one", caption=self.text, references=references)


@pytest.fixture(scope="module")
def parts(pretrained):
    trained = load_trained(pretrained)
    config = smallest_task("captioning", pretrained, "unused")
    sources, caches = finetuning.make_data(config, trained, pretrained)
    assert set(caches) == set(pipeline.SPLITS)
    loaders = {split: finetuning.own_loader(config, trained, c, whole=True) for split, c in caches.items()}
    return trained, loaders, sources


@pytest.mark.parametrize(("name", "text"), [("captioning", " ..."), ("speech_recognition", "?!")])
def test_a_reference_without_words_is_told_before_the_training(parts, name, text):
    trained, loaders, sources = parts
    config = smallest_task(name, trained.directory, "unused")
    row = int(loaders["test"].cache.source_row[3])
    changed = sources | {"test": Changed(sources["test"], row, text)}
    with pytest.raises(InputSetError, match="sample 'odd one' of the test split has references") as told:
        finetuning.TASKS[name](config, trained, loaders, changed)
    assert repr(text) in str(told.value) and "\n" not in str(told.value)
    config.evaluation.texts = 3  # the rows after these are not scored
    finetuning.TASKS[name](config, trained, loaders, changed)


def test_captions_are_scored_with_the_frequencies_of_a_file(parts, tmp_path, monkeypatch):
    trained, loaders, sources = parts
    config = smallest_task("captioning", trained.directory, "unused")
    written = ["a red ball", "a small tree and a dog", *["the dog"] * 8]
    monkeypatch.setattr(evaluation, "write_texts", lambda *args, **kwargs: written)
    task = finetuning.TASKS["captioning"](config, trained, loaders, sources)
    references = [list(triplet.references) for triplet in task.tested[1]]
    own = task.evaluate(trained.model.params, tmp_path)
    frequencies = document_frequencies([*references, ["a dog"], ["a small ball"]])
    config.evaluation.document_frequencies = str(tmp_path / "frequencies.json")
    (tmp_path / "frequencies.json").write_text(json.dumps(frequencies))
    found = task.evaluate(trained.model.params, tmp_path)
    for results, given in ((own, None), (found, frequencies)):
        expected = caption_scores(written, references, given)
        assert {key.split("/")[2]: value for key, value in results.items() if "/image/" in key} == expected
    assert own["captioning/image/CIDEr"] != found["captioning/image/CIDEr"] > 0
    shown = json.loads((tmp_path / "examples.json").read_text())["captions"]
    assert [example["from_image"] for example in shown] == written[:2]


def test_what_is_judged_is_the_content_of_a_file(pretrained, tmp_path):
    config = smallest_task("captioning", pretrained, tmp_path)
    without = finetuning.judging(config)
    assert "document_frequencies" not in without  # as of runs from before there was such a field
    found = []
    for name, content in (("a.json", "1"), ("b.json", "1"), ("b.json", "2")):
        (tmp_path / name).write_text(content)
        config.evaluation.document_frequencies = str(tmp_path / name)
        found.append(finetuning.judging(config))
    assert found[0] == found[1] != found[2] and without.items() < found[0].items()
