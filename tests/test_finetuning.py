"""Fine-tuning from the smallest pre-training: every task trains, is measured, and goes on where it was."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from opt_jax import ablation, finetuning, pipeline
from opt_jax.cache import CacheError
from opt_jax.configuration import ConfigError, load
from opt_jax.encoders import dvae
from opt_jax.evaluation.large_pool import evaluate_large_pool
from opt_jax.evaluation.run import evaluate_retrieval
from opt_jax.models.inputs import standardise
from opt_jax.stages import StageMismatch
from opt_jax.tasks import drawing
from opt_jax.tasks.input_sets import InputSetError
from opt_jax.tasks.validation import validate
from opt_jax.trained import WorkdirError, load_trained

ROOT = Path(__file__).parents[1]
FIGURES = {
    "captioning": ["captioning/image/CIDEr", "captioning/image_audio/BLEU-4"],
    "speech_recognition": ["speech_recognition/audio/WER", "speech_recognition/audio_image/CER"],
    "classification": ["classification/T/mAP", "classification/T+I+A/mAP"],
    "retrieval": ["retrieval_matching/image_to_text/R@1", "retrieval_alignment/text_audio_to_image/R@10"],
    "text_to_image": ["text_to_image/code_accuracy", "audio_to_image/code_perplexity"],
    "vqa": ["question_answering/T+I/accuracy", "question_answering/I+A/accuracy_written"],
}


def smallest_task(name, pretrained, workdir):
    config = load(ROOT / "configs" / "finetune" / f"{name}.py")
    config.pretrained, config.workdir = str(pretrained), str(workdir)
    config.train.update(steps=2, batch_size=8, warmup_steps=1, log_every=1)
    with config.unlocked():
        config.train.mesh = dict(data=1, fsdp=1, tensor=1)
    config.evaluation.update(batch_size=10, examples=2)
    small = dict(texts=10, beams=2, pools=2, probe_train=20, pool_size=10, rerank_top=3, pictures=4, drawn=2)
    config.evaluation.update({k: v for k, v in small.items() if k in config.evaluation})
    if name == "text_to_image":
        config.picture_decoder.train.update(steps=2, batch_size=4, warmup_steps=1)
        with config.unlocked():
            config.picture_decoder.train.mesh = dict(data=1, fsdp=1, tensor=1)
    if name == "vqa":
        config.data.update(train=24, validation=10, test=20)
    return config


EVERY_DAY = "captioning"  # the others take half a minute each


@pytest.mark.parametrize(
    "name", [n if n == EVERY_DAY else pytest.param(n, marks=pytest.mark.slow) for n in FIGURES]
)
def test_every_task_trains_is_measured_and_kept(name, pretrained, tmp_path, capsys):
    config = smallest_task(name, pretrained, tmp_path)
    validate(config)
    results = finetuning.run(config, tmp_path)
    for key in FIGURES[name]:
        assert np.isfinite(results[key]), key
        assert name == "vqa" or np.isfinite(results[f"before/{key}"])
    page = (tmp_path / "report.html").read_text()
    assert ("Before and after fine-tuning" in page) == (name != "vqa")
    if name in ("classification", "retrieval"):
        shown = json.loads((tmp_path / "evaluation" / "examples.json").read_text())
        examples = shown["labels" if name == "classification" else "retrieval"]
        assert len(examples) == (2 if name == "classification" else 2 * 5)
        assert page.count("data:audio") >= 2 and page.count("data:image/png") >= 2
    if name == "classification":
        assert [found["inputs"] for found in examples[0]["found"]] == list(config.inputs)
        assert all(told["labels"] and example["truths"] for example in examples for told in example["found"])
    if name == "vqa":
        shown = json.loads((tmp_path / "evaluation" / "examples.json").read_text())["questions"]
        assert [set(example) for example in shown] == [{"text", "image", "audio", "answers", "truths"}] * 2
        assert [answer["inputs"] for answer in shown[0]["answers"]] == list(config.inputs)
        assert page.count("data:audio") == page.count("data:image/png") == 2 and shown[1]["text"] in page
    losses = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses] == [1, 2] and np.isfinite([x["total"] for x in losses]).all()
    capsys.readouterr()
    again = finetuning.run(config, tmp_path)
    told = capsys.readouterr().out
    assert (
        "before: up to date" in told and "evaluation: up to date" in told and "finetune: up to date" in told
    )
    assert again == results


@pytest.mark.slow
def test_short_lists_with_everyone_on_them_rank_as_all_pairs_do(pretrained, tmp_path):
    trained = load_trained(pretrained)
    caches = finetuning.make_data(smallest_task("retrieval", pretrained, tmp_path), trained, tmp_path)[1]
    config = smallest_task("retrieval", pretrained, tmp_path)
    config.evaluation.update(pools=1, shortlist=10, chunk=4, batch_size=8)
    loaders = {split: finetuning.own_loader(config, trained, c, whole=True) for split, c in caches.items()}
    told = []
    small, _, _ = evaluate_retrieval(config.evaluation, trained.model, loaders, lambda what: None)
    large = evaluate_large_pool(config.evaluation, trained.model, loaders, told.append)
    assert "a pool of 10, 500 pairs on its short lists: in all about" in told[0] and "minutes" in told[0]
    shared = [key for key in small if key.startswith(("retrieval_alignment/", "retrieval_matching/"))]
    assert len(shared) == 30
    for key in shared:
        assert large[key] == small[key], key
    assert large["retrieval/image_to_text/shortlisted"] == 100.0
    # Without validation triplets the first test rows stand in for them.
    loaders["validation"].cache.presence = loaders["validation"].cache.presence & [True, False, False]
    without = evaluate_large_pool(config.evaluation, trained.model, loaders, told.append)
    assert "on the test split, in 1 pools of 8" in told[-2]
    assert "weights chosen on the first test pool" in without["retrieval/description"]
    for key in shared:
        assert without[key] == small[key], key


@pytest.mark.slow
def test_noisy_speech_has_features_of_its_own(pretrained, tmp_path):
    config = smallest_task("speech_recognition", pretrained, tmp_path)
    config.data.kind = "noise"
    assert np.isfinite(finetuning.run(config, tmp_path)["speech_recognition/audio/WER"])
    clean, noisy = (pipeline.FeatureCache(d / "cache" / "test" / "features") for d in (pretrained, tmp_path))
    np.testing.assert_array_equal(clean[3]["text_ids"], noisy[3]["text_ids"])
    assert (clean[3]["audio_features"] != noisy[3]["audio_features"]).any()


@pytest.mark.slow
def test_the_ablation_leaves_out_a_family_at_a_time(pretrained, tmp_path, capsys):
    config = load(ROOT / "configs" / "ablation.py")
    config.pretrained, config.workdir, config.steps = str(pretrained), str(tmp_path), 2
    config.evaluation.update(batch_size=10, pool_size=10, pools=2, validation_pools=1, probe_train=20)
    with config.unlocked():
        config.families = dict(MLM=("mlm",), MVM=("mvfr", "mrc"))
    validate(config)
    results = ablation.run(config, tmp_path)
    assert list(results) == ["full", "MLM", "MVM"]
    logged = json.loads((tmp_path / "MVM" / "metrics.jsonl").read_text().splitlines()[0])
    assert "mlm" in logged and not {"mvfr", "mrc"} & set(logged)
    assert "without MVM" in (tmp_path / "table.md").read_text()
    capsys.readouterr()
    assert ablation.run(config, tmp_path) == results
    assert capsys.readouterr().out.count("evaluation: up to date") == 3


def test_a_task_only_shows_what_its_data_have(pretrained):
    trained = load_trained(pretrained)
    sources = pipeline.make_sources(trained.config, pretrained)
    config = smallest_task("captioning", pretrained, "unused")
    loaders = {
        split: finetuning.own_loader(
            config, trained, pipeline.FeatureCache(pretrained / "cache" / split / "features"), whole=True
        )
        for split in ("train", "test")
    }
    config.inputs = ("T",)
    with pytest.raises(InputSetError, match="the text is what captioning is to make"):
        finetuning.TASKS["captioning"](config, trained, loaders, sources)
    config.inputs = ("I",)
    silent = loaders["test"].cache.presence.copy()
    loaders["test"].cache.presence = silent & [True, False, True]
    with pytest.raises(InputSetError, match="no row of the test split has text and image"):
        finetuning.TASKS["captioning"](config, trained, loaders, sources)


def losses(task, params, batch):
    """Those of one batch, as a training step has them, without dropout; compiled, which is faster here."""

    @jax.jit
    def compute(params, batch):
        return task.losses(
            params, task.prepare(jax.random.key(0), batch), jax.random.key(1), 0, dropout=False
        )

    return compute(params, batch)


def test_what_is_shown_changes_what_is_lost(pretrained, monkeypatch):
    """The loss of a captioning row depends on the picture if and only if the picture is shown."""
    trained = load_trained(pretrained)
    sources = pipeline.make_sources(trained.config, pretrained)
    config = smallest_task("captioning", pretrained, "unused")
    caches = {s: pipeline.FeatureCache(pretrained / "cache" / s / "features") for s in ("train", "test")}
    loaders = {s: finetuning.own_loader(config, trained, cache, whole=True) for s, cache in caches.items()}
    batch = next(iter(loaders["train"].from_step(0)))
    other = batch | {"region_features": batch["region_features"][::-1] * np.float16(0.5)}

    def loss(inputs, batch):
        config.inputs = inputs
        task = finetuning.TASKS["captioning"](config, trained, loaders, sources)
        return float(losses(task, trained.model.params, batch)["text"][0])

    assert loss(("A",), batch) == loss(("A",), other)
    from_picture = loss(("I",), batch)
    assert from_picture != loss(("I",), other)
    # Positions of what is never shown are left out, which changes no figure.
    statistics = trained.model.statistics
    monkeypatch.setattr(finetuning.Downstream, "ready", lambda _, batch: standardise(batch, statistics))
    np.testing.assert_allclose(loss(("I",), batch), from_picture, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("query", ["text", "audio"])
def test_drawings_fit_a_query_that_is_heard_once_as_one_heard_with_each(pretrained, query):
    trained = load_trained(pretrained)
    source = pipeline.make_sources(trained.config, pretrained)["test"]
    triplets = [source.read(row) for row in range(4)]
    codes = np.random.default_rng(0).integers(0, 9, (4, 64))
    pictures = dvae.decode(trained.dvae, codes)
    whole = [dataclasses.replace(t, image=p) for t, p in zip(triplets, pictures, strict=True)]
    nothing = dict.fromkeys(("image", "caption", "audio"))
    asked = "caption" if query == "text" else query
    alone = [dataclasses.replace(t, **nothing | {asked: getattr(t, asked)}) for t in triplets]
    task = SimpleNamespace(trained=trained, dvae=trained.dvae)
    empty = [dataclasses.replace(t, **nothing) for t in triplets]
    found = drawing.Drawing.matches(task, codes, empty, trained.batch(alone), query)
    expected = drawing.fitting(trained.model, trained.batch(whole), query)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.ptp(found) > 1e-3


def test_the_margin_is_between_each_pair_and_its_negatives(pretrained, monkeypatch):
    """Against the matching scores of all pairs, from which the hinges are put together by hand."""
    trained = load_trained(pretrained)
    config = smallest_task("retrieval", pretrained, "unused")
    config.inputs, config.anchors, config.negatives = ("T+I", "T+I+A"), 3, 2
    caches = {s: pipeline.FeatureCache(pretrained / "cache" / s / "features") for s in ("train", "test")}
    loaders = {s: finetuning.own_loader(config, trained, cache, whole=True) for s, cache in caches.items()}
    sources = pipeline.make_sources(trained.config, pretrained)
    task = finetuning.TASKS["retrieval"](config, trained, loaders, sources)
    negatives = jnp.array([[3, 4], [5, 6], [7, 3]])  # of rows 0, 1 and 2
    monkeypatch.setattr(task, "negatives", lambda key, similarity, usable: negatives)
    batch = next(iter(loaders["train"].from_step(0)))
    batch["caption_key"] = np.arange(8)
    params = jax.tree.map(  # matching that is not the same for every pair
        lambda leaf: leaf + 0.1 * np.random.default_rng(leaf.size).normal(size=leaf.shape),
        trained.model.params,
    )
    found = losses(task, params, batch)
    expected = 0.0
    for queries in (("text",), ("text", "audio")):
        right = jax.nn.sigmoid(task.model(params).matching(batch, queries, "image"))
        for row, others in enumerate(np.asarray(negatives)):
            for other in others:
                expected += max(0.0, config.margin + right[row, other] - right[row, row])
                expected += max(0.0, config.margin + right[other, row] - right[row, row])
    total, count = found["margin"]
    assert count == 24 and expected > 1
    np.testing.assert_allclose(total, expected, rtol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(pretrained="nowhere"), "holds no pre-training"),
        (dict(task="caption"), "config.task is 'caption'"),
        (dict(label_smoothing=2.0), "config.label_smoothing is 2.0"),
        (dict(dropout=1.0), "config.dropout"),
        (dict(task="vqa"), "config.data.kind is 'pretraining'"),
        (dict(inputs=("I", "A", "I")), "config.inputs names 'I' twice"),
        (dict(predicted_step_seconds=-1.0), "config.predicted_step_seconds is -1.0"),
        (dict(evaluation=dict(document_frequencies="gone.json")), "frequencies: gone.json: no document freq"),
    ],
)
def test_bad_configurations_are_told(pretrained, change, message):
    config = smallest_task("captioning", pretrained, "unused")
    config.update(change)
    with pytest.raises(ConfigError, match=message):
        validate(config)


def test_tasks_refuse_what_cannot_be_answered_or_ranked(pretrained):
    config = smallest_task("vqa", pretrained, "unused")
    config.inputs = ("T+I", "I")
    with pytest.raises(ConfigError, match="config.inputs 'I' shows no question"):
        validate(config)
    config = smallest_task("retrieval", pretrained, "unused")
    config.evaluation.pool_size = 1
    with pytest.raises(ConfigError, match="config.evaluation.pool_size is 1; of one there"):
        validate(config)
    config = smallest_task("speech_recognition", pretrained, "unused")
    config.data.update(kind="noise", decibels=float("nan"))
    with pytest.raises(ConfigError, match="config.data.decibels is nan; it must be finite"):
        validate(config)


@pytest.mark.parametrize(
    ("families", "evaluation", "message"),
    [
        ({}, {}, "config.families is empty"),
        ({"full": ("mlm",)}, {}, "'full' cannot be the name of a family"),
        ({"a/b": ("mlm",)}, {}, "'a/b' cannot be the name of a family"),
        ({"MLM": ()}, {}, "config.families.MLM is empty"),
        ({"MLM": ("mlm",)}, {"pools": 0}, "config.evaluation.pools is 0"),
        ({"MLM": ("mlm",)}, {"probe_train": -5}, "config.evaluation.probe_train is -5"),
    ],
)
def test_an_ablation_that_cannot_work_is_refused_before_its_trainings(
    pretrained, families, evaluation, message
):
    config = load(ROOT / "configs" / "ablation.py")
    config.pretrained = str(pretrained)
    config.families = ConfigDict(families)
    config.evaluation.update(evaluation)
    with pytest.raises(ConfigError, match=message):
        validate(config)


def test_data_that_are_not_the_cache_s_any_more_are_refused(pretrained, tmp_path, monkeypatch):
    found = pipeline.make_sources(load_trained(pretrained).config, pretrained)["test"].fingerprint()
    changed = property(lambda self: lambda: found | {"count": 21})
    monkeypatch.setattr("opt_jax.data.spoken_scenes.SpokenScenes.fingerprint", changed)
    with pytest.raises(CacheError, match="count: "):
        finetuning.run(smallest_task("captioning", pretrained, tmp_path), tmp_path)


def test_until_something_is_trained_the_configuration_is_the_last_that_was_accepted(
    pretrained, tmp_path, monkeypatch
):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    def attempt(error, **change):
        config = smallest_task("captioning", pretrained, tmp_path)
        config.update(change)
        with pytest.raises(error):
            finetuning.run(config, tmp_path)
        place = tmp_path / "config.json"
        return json.loads(place.read_text())["train"]["learning_rate"] if place.exists() else None

    monkeypatch.setattr(finetuning.Writing, "before", lambda self, directory: {})
    monkeypatch.setattr(finetuning, "train", interrupted)
    assert attempt(WorkdirError, pretrained_step=7) is None
    assert attempt(KeyboardInterrupt, train=dict(learning_rate=0.5)) == 0.5
    assert attempt(KeyboardInterrupt, train=dict(learning_rate=0.25)) == 0.25  # corrected
    assert attempt(StageMismatch, train=dict(learning_rate=0.125), dropout=0.5) == 0.25
    (tmp_path / "checkpoints" / "finetune" / "1").mkdir()
    assert attempt(KeyboardInterrupt, train=dict(learning_rate=0.125)) == 0.25  # which trained what is there


@pytest.mark.parametrize("inputs", [("I",), ("I", "I+A")])
def test_there_is_no_transcript_without_speech(pretrained, tmp_path, inputs):
    config = smallest_task("speech_recognition", pretrained, tmp_path)
    config.inputs = inputs
    with pytest.raises(InputSetError, match="without A"):
        finetuning.run(config, tmp_path)


def test_a_fine_tuning_is_no_pretraining(tmp_path):
    config = smallest_task("captioning", "nowhere", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(WorkdirError, match="that of a captioning"):
        load_trained(tmp_path)


def test_a_missing_step_is_told(pretrained, tmp_path):
    config = smallest_task("captioning", pretrained, tmp_path)
    config.pretrained_step = 7
    with pytest.raises(WorkdirError, match="no checkpoint of step 7"):
        finetuning.run(config, tmp_path)
