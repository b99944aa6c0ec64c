"""wav2vec 2.0: shapes, padding, the positional convolution, masking, negatives, losses."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_wav2vec2_batches import Noise, speech

from configs.encoders.wav2vec2 import get_config
from opt_jax.checkpoints import restore_parameters
from opt_jax.encoders import wav2vec2_objectives as objectives
from opt_jax.encoders.frozen import load_frozen
from opt_jax.encoders.wav2vec2 import Wav2Vec2ForCTC, frame_count
from opt_jax.encoders.wav2vec2_extraction import Extractor, feature_size, windows
from opt_jax.encoders.wav2vec2_layers import grouped_convolution
from opt_jax.encoders.wav2vec2_quantizer import Quantizer
from opt_jax.encoders.wav2vec2_training import ctc_task, ssl_task, train_wav2vec2
from opt_jax.partitioning import RULES, logical_axes, unbox


def small_config(**model) -> ConfigDict:
    config = get_config("tiny")
    config.model.update(
        dict(
            conv_dim=(6,) * 7,
            hidden_size=8,
            num_layers=2,
            num_heads=2,
            intermediate_size=12,
            position_kernel=4,
        )
    )
    config.model.update(dict(position_groups=2, **model))
    config.ssl.update(
        dict(codebook_size=5, codevector_dim=8, projection_dim=8, num_negatives=3, mask_length=2)
    )
    return config


@pytest.fixture(scope="module")
def extractor():
    config = small_config().model
    init = jax.jit(Wav2Vec2ForCTC(config).init)
    params = unbox(init(jax.random.key(0), jnp.zeros((1, 2000)), jnp.array([2000]))["params"])
    return Extractor(params, config, bucket=4000)


@pytest.mark.parametrize(
    "samples, frames",
    # one frame sees 400 samples, the next begins 320 later
    [(0, 0), (399, 0), (400, 1), (719, 1), (720, 2), (16000, 49), (16079, 49), (16080, 50), (80000, 249)],
)
def test_frame_count(samples, frames):
    config = get_config("base").model
    assert frame_count(samples, config) == frames
    assert frame_count(np.array([samples]), config).tolist() == [frames]


@pytest.mark.parametrize("frames", [1, 9, 10, 11, 14, 37, 100])
def test_windows_keep_every_frame_once_and_with_its_context(frames):
    found = windows(frames, 10, 2)
    kept = [frame for window in found for frame in range(window.start, window.stop)]
    assert kept == list(range(frames))
    for window in found:
        last = min(window.first + 10, frames)
        assert window.start == 0 or window.start - window.first >= 2
        assert window.stop == frames or last - window.stop >= 2
        assert window.start >= window.first and window.stop <= last
    with pytest.raises(ValueError, match="keep nothing between contexts of 5"):
        windows(30, 10, 5)


def unnormalised(extractor) -> ConfigDict:
    config = ConfigDict(extractor.config)
    config.normalize_waveforms = False
    return config


def test_a_long_recording_is_its_windows(extractor):
    # Windows of 12 frames that keep 8 of them, of recordings of 37 and 12 frames.
    config = unnormalised(extractor)
    seconds = dict(window_seconds=12 * 320 / 16000, context_seconds=2 * 320 / 16000)
    whole = Extractor(extractor.params, config, bucket=4000)
    windowed = Extractor(extractor.params, config, bucket=4000, **seconds)
    waveforms, lengths = np.stack([speech(5, 12000), speech(6, 12000)]), np.array([12000, 4000])
    features, counts = windowed.extract(waveforms, lengths)
    assert counts.tolist() == [37, 12] and features.shape[1] == 37
    for row, first, start, stop in [(0, 0, 0, 10), (0, 8, 10, 18), (0, 16, 18, 26), (0, 25, 27, 37)]:
        part = waveforms[row : row + 1, first * 320 : first * 320 + 12 * 320 + 399]
        expected, _ = whole.extract(part, np.array([part.shape[1]]))
        kept = slice(start - first, stop - first)
        np.testing.assert_allclose(features[row, start:stop], expected[0, kept], atol=1e-5)
    alone, _ = whole.extract(waveforms[1:, :4000], lengths[1:])
    np.testing.assert_allclose(features[1, :12], alone[0, :12], atol=1e-5)
    assert not features[1, 12:].any()


def test_windows_are_as_exact_as_the_recording(extractor):
    seconds = dict(window_seconds=12 * 320 / 16000, context_seconds=2 * 320 / 16000)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), extractor.params)
        config = unnormalised(extractor)
        whole, windowed = Extractor(params, config), Extractor(params, config, **seconds)
        waveforms = speech(5, 12000)[None].astype(np.float64) / 3  # which float32 cannot hold
        found, _ = windowed.extract(waveforms, np.array([12000]))
        part = waveforms[:, 8 * 320 : 8 * 320 + 12 * 320 + 399]
        expected, _ = whole.extract(part, np.array([part.shape[1]]))
    np.testing.assert_allclose(found[0, 10:18], np.asarray(expected)[0, 2:10], atol=1e-11)


def test_the_waveform_is_normalised_over_the_whole_recording(extractor):
    loud = speech(7, 12000) * np.linspace(0.1, 5, 12000, dtype=np.float32) + 3
    seconds = dict(window_seconds=12 * 320 / 16000, context_seconds=2 * 320 / 16000)
    found, _ = Extractor(extractor.params, extractor.config, **seconds).logits(loud[None], np.array([12000]))
    config = unnormalised(extractor)
    normal = (loud - loud.mean()) / loud.std()
    expected, _ = Extractor(extractor.params, config, **seconds).logits(normal[None], np.array([12000]))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_padding_and_company_never_change_a_valid_frame(extractor):
    short, long = speech(1, 2500), speech(2, 3900)
    alone, count = extractor.extract(short[None], np.array([2500]))
    padded = np.full((2, 3900), 7.0, np.float32)  # what lies behind the end must not matter
    padded[0, :2500], padded[1] = short, long
    together, counts = extractor.extract(padded, np.array([2500, 3900]))
    assert counts.tolist() == [7, 11] == [int(count[0]), 11]
    np.testing.assert_allclose(together[0, :7], alone[0, :7], rtol=1e-5, atol=1e-5)
    assert not np.any(together[0, 7:])
    assert np.abs(np.asarray(together[1, 7:11])).min() > 0


def test_loudness_does_not_matter(extractor):
    clip = speech(3, 3000)
    features, _ = extractor.extract(np.stack([clip, 100 * clip + 5]), np.array([3000, 3000]))
    np.testing.assert_allclose(features[0], features[1], atol=1e-4)


def test_clips_without_a_frame_or_with_nan_harm_nobody(extractor):
    features, counts = extractor.extract(np.zeros((2, 0), np.float32), np.array([0, 0]))
    assert counts.tolist() == [0, 0] and not np.any(features)
    clip = speech(5, 2000)
    alone, _ = extractor.extract(clip[None], np.array([2000]))
    broken = np.stack([clip, np.full(2000, np.nan, np.float32), clip])
    together, counts = extractor.extract(broken, np.array([2000, 2000, 368]))  # 368 samples: 23 ms
    assert counts.tolist() == [6, 6, 0] and not np.any(together[2])
    np.testing.assert_allclose(together[0], alone[0], rtol=1e-5, atol=1e-5)
    assert np.isnan(together[1, :6]).all()  # which the cache sets aside, with the clip's id


@pytest.mark.parametrize("features, width", [("conv", 6), ("1", 8), ("context", 8)])
def test_extracted_widths(extractor, features, width):
    config = ConfigDict(extractor.config.to_dict())
    config.features = features
    found, _ = Extractor(extractor.params, config, bucket=4000).extract(
        speech(4, 2000)[None], np.array([2000])
    )
    assert found.shape == (1, 12, width) and feature_size(config) == width
    config.features = "3"  # there are two layers, so hidden states 0, 1, 2
    with pytest.raises(ValueError, match="below 3"):
        Extractor(extractor.params, config, bucket=4000).extract(speech(4, 2000)[None], np.array([2000]))


@pytest.mark.parametrize("size, groups", [(8, 2), (5, 4), (64, 4)])
def test_grouped_convolution_and_its_gradient_are_those_of_the_definition(size, groups):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (2, 11, 8)), jax.random.normal(keys[1], (size, 8 // groups, 8))
    weight = jax.random.normal(keys[2], x.shape)

    def by_definition(x, kernel):
        padded = jnp.pad(x, ((0, 0), (size // 2, size - 1 - size // 2), (0, 0)))
        windows = jnp.stack([padded[:, k : k + 11] for k in range(size)]).reshape(size, 2, 11, groups, -1)
        kernel = kernel.reshape(size, 8 // groups, groups, -1)
        return jnp.einsum("kbfgi,kigo->bfgo", windows, kernel).reshape(x.shape)

    def total(function):
        return jax.jit(jax.value_and_grad(lambda *args: (function(*args) * weight).sum(), argnums=(0, 1)))

    found = total(lambda x, kernel: grouped_convolution(x, kernel, groups))(x, kernel)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-4), found, total(by_definition)(x, kernel))


def test_span_mask_covers_whole_spans_of_valid_frames():
    valid = jnp.arange(60) < jnp.array([60, 33, 10, 4])[:, None]
    masks = np.stack([objectives.span_mask(jax.random.key(i), valid, 0.65, 5) for i in range(20)])
    assert not np.any(masks & ~np.asarray(valid))
    for row in masks.reshape(-1, 60):
        runs = [len(list(group)) for masked, group in itertools.groupby(row) if masked]
        assert all(run >= 5 for run in runs)
    share = masks.sum(axis=(0, 2)) / (20 * np.array([60, 33, 10, 4]))
    assert 0.4 < share[0] < 0.62 and 0.3 < share[1] < 0.65  # overlaps take 0.65 down to about a half
    assert share[2] > 0.5 and share[3] == 0  # at least two spans where they fit, none in a shorter clip
    assert len({row.tobytes() for row in masks[:, 0]}) > 15


def test_negatives_are_other_masked_frames_of_the_clip():
    mask = jax.random.bernoulli(jax.random.key(0), 0.4, (3, 20)).at[2].set(False).at[2, 5].set(True)
    negatives = np.asarray(objectives.sample_negatives(jax.random.key(1), mask, 50))
    mask = np.asarray(mask)
    for clip in range(2):
        for frame in np.flatnonzero(mask[clip]):
            others = set(np.flatnonzero(mask[clip])) - {frame}
            assert set(negatives[clip, frame].tolist()) == others  # all of them, none else, in 50 draws
    terms = objectives.contrastive_terms(
        jnp.ones((3, 20, 2)), jnp.ones((3, 20, 2)), jnp.arange(60).reshape(3, 20, 1), mask, negatives, 0.1
    )
    assert (
        float(terms["contrast"][1]) == mask[:2].sum()
    )  # a masked frame that is alone has nothing to be told from


def test_contrast_prefers_aligned_to_anti_aligned_and_stays_in_the_clip():
    targets = jax.random.normal(jax.random.key(0), (2, 8, 4))
    codes, mask = jnp.arange(16).reshape(2, 8, 1), jnp.ones((2, 8), bool)
    negatives = objectives.sample_negatives(jax.random.key(1), mask, 6)

    def loss(context, targets=targets, codes=codes):
        return objectives.contrastive_terms(context, targets, codes, mask, negatives, 0.1)

    aligned, opposed = loss(targets), loss(-targets)
    assert float(aligned["contrast"][0]) < float(loss(jnp.roll(targets, 1, axis=1))["contrast"][0])
    assert float(aligned["contrast"][0]) < float(opposed["contrast"][0]) / 3
    assert float(aligned["contrast_accuracy"][0]) == 16 and float(opposed["contrast_accuracy"][0]) == 0
    np.testing.assert_allclose(aligned["contrast_chance"][0] / 16, 1 / 7, rtol=1e-6)
    first = mask.at[1].set(False)
    gradient = jax.grad(
        lambda t: objectives.contrastive_terms(targets, t, codes, first, negatives, 0.1)["contrast"][0]
    )(targets)
    assert np.any(gradient[0]) and not np.any(gradient[1])


def test_contrast_by_hand_and_without_equal_codes():
    # context looks at target 0: similarities 1, 0 and (equal codes) left out
    context = jnp.array([[[2.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    targets = jnp.array([[[1.0, 0.0], [0.0, 3.0], [1.0, 0.0]]])
    codes = jnp.array([[[0], [1], [0]]])
    mask = jnp.array([[True, True, False]])
    negatives = jnp.array([[[1, 2], [0, 2], [0, 0]]])
    terms = objectives.contrastive_terms(context, targets, codes, mask, negatives, 0.5)
    expected = np.log(np.exp(2) + 1) - 2 + np.log(np.exp(2) + 2) - 2
    np.testing.assert_allclose(terms["contrast"][0], expected, rtol=1e-6)
    np.testing.assert_allclose(terms["contrast_chance"][0], 1 / 2 + 1 / 3, rtol=1e-6)


def test_perplexity_and_diversity():
    probabilities = jnp.array([[[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]]])
    mask = jnp.array([[True, False]])
    np.testing.assert_allclose(objectives.code_perplexity(probabilities, mask), [2.0, 1.0], rtol=1e-6)
    total, count = objectives.diversity_terms(probabilities, mask)
    np.testing.assert_allclose([total, count], [(6 - 3) / 6, 1], rtol=1e-6)
    assert float(objectives.code_perplexity(probabilities, jnp.zeros((1, 2), bool)).sum()) == 2.0  # no NaN


def test_quantizer_chooses_entries_and_passes_gradients():
    config = small_config().ssl
    x = jax.random.normal(jax.random.key(0), (1, 4, 6))
    variables = unbox(Quantizer(config).init(jax.random.key(1), x))
    params = variables["params"]

    def apply(params, temperature):
        return Quantizer(config).apply({"params": params}, x, temperature, rngs={"gumbel": jax.random.key(2)})

    for temperature in (None, 2.0):
        found = apply(params, temperature)
        codes = np.asarray(found.codes)
        entries = np.stack([params["codebooks"][g, codes[..., g]] for g in range(2)], axis=2)
        np.testing.assert_allclose(found.vectors, entries.reshape(1, 4, 8), atol=1e-6)
    assert np.any(apply(params, 2.0).codes != apply(params, None).codes)
    gradients = jax.grad(lambda p: jnp.square(apply(p, 2.0).vectors).sum())(params)
    assert np.any(gradients["logits"]["kernel"])


def test_ctc_by_hand_and_unalignable_transcripts():
    logits = jnp.zeros((3, 3, 3))  # every letter 1/3
    valid = jnp.array([[True, True, False], [True, True, True], [True, True, False]])
    labels = jnp.array([[1, 0], [1, 2], [2, 2]])
    terms = objectives.ctc_terms(logits, valid, labels, jnp.array([1, 2, 2]))
    # 2 frames for "1": 3 paths of 9; 3 frames for "12": 5 paths of 27; "22" needs 3 frames and has 2
    np.testing.assert_allclose(terms["ctc"][0], -np.log(3 / 9) - np.log(5 / 27), rtol=1e-5)
    assert [float(terms["ctc"][1]), *map(float, terms["ctc_unalignable"])] == [3, 1, 3]


def test_letters_there_and_back():
    vocabulary = ("<pad>", "|", "'", "a", "b", "c")
    letters = objectives.encode_letters("Ab  b-a, c'", vocabulary)
    assert letters == [3, 4, 1, 4, 1, 3, 1, 5, 2]
    logits = np.eye(6)[[[3, 3, 0, 3, 4, 1, 1, 0, 4, 4, 2, 2]]]
    assert objectives.greedy_decode(logits, np.array([10]), vocabulary) == ["aab b"]
    assert objectives.encode_letters("ab", ("<pad>", "|", "A", "B")) == [2, 3]


@pytest.mark.parametrize("variant", ["tiny", "base", "large"])
def test_every_axis_name_has_a_rule(variant):
    config = get_config(variant)
    batch = dict(waveforms=jnp.zeros((1, 4000)), lengths=jnp.array([4000]))
    for task in (ssl_task(config), ctc_task(config)):
        shapes = jax.eval_shape(lambda task=task: task.init(jax.random.key(0), batch))
        names = {name for axes in logical_axes(shapes).values() for name in axes} - {None}
        assert names <= set(RULES)
        count = sum(leaf.size for leaf in jax.tree.leaves(unbox(shapes)))
        millions = {"tiny": (0.6, 1.0), "base": (94, 96), "large": (315, 318)}[variant]
        assert millions[0] < count / 1e6 < millions[1]


def recipe(steps: int) -> ConfigDict:
    config = small_config(num_layers=1)
    config.batches.update(dict(bucket_seconds=(0.2,), pool_batches=2, letters_per_second=40.0))
    config.batches.evaluation_batch_size = 4
    for part in (config.ssl, config.ctc):
        part.train.update(dict(steps=steps, batch_size=2, mesh=dict(data=1)))
    return config


@pytest.mark.slow  # tests/test_pipeline.py runs the recipe too, without looking at what it returns
def test_recipe_trains_freezes_and_reads_back(tmp_path):
    config = recipe(steps=2)
    config.ctc.compare_scratch = True
    metrics = train_wav2vec2(config, Noise(), Noise(), tmp_path, 0)
    wanted = {"ssl_contrast_accuracy", "ssl_contrast_chance", "ssl_code_perplexity", "WER", "scratch_WER"}
    assert wanted <= set(metrics)
    assert metrics["clips"] == 9 and 0 < metrics["ssl_code_perplexity"] <= 100
    params, model = load_frozen(tmp_path)
    assert set(params) == {"wav2vec2", "ctc_head"}
    clip, length = speech(0, 2000)[None], np.array([2000])
    features, counts = Extractor(params, ConfigDict(model)).extract(clip, length)
    logits, _ = Extractor(params, ConfigDict(model)).logits(clip, length)
    assert features.shape[2] == 8 and counts.tolist() == [6] and logits.shape[2] == 29


@pytest.mark.parametrize(
    "half, told, frozen",
    [
        pytest.param(
            "ssl",
            {"ssl_contrast", "ssl_contrast_accuracy", "ssl_contrast_chance", "ssl_code_perplexity"},
            {"wav2vec2", "quantizer"},
            marks=pytest.mark.slow,
        ),
        ("ctc", {"WER", "CER", "clips"}, {"wav2vec2", "ctc_head"}),
    ],
)
def test_each_half_can_be_switched_off(tmp_path, half, told, frozen):
    config = recipe(steps=1)
    # One layer of convolution compiles faster than seven.
    config.model.update(dict(conv_dim=(6,), conv_kernel=(400,), conv_stride=(320,)))
    config.ctc.compare_scratch = True  # with nothing to compare
    for part in ("ssl", "ctc"):
        config[part].enabled = part == half
    assert set(train_wav2vec2(config, Noise(), Noise(), tmp_path, 0)) == told
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"wav2vec2_{half}"]
    found, _ = load_frozen(tmp_path)
    assert frozen <= set(found)
    _, trained = restore_parameters(tmp_path / "checkpoints" / f"wav2vec2_{half}")
    jax.tree.map(np.testing.assert_array_equal, found, trained)


def test_something_has_to_be_trained(tmp_path):
    config = recipe(steps=1)
    config.ssl.enabled = config.ctc.enabled = False
    with pytest.raises(ValueError, match="nothing to train"):
        train_wav2vec2(config, Noise(), Noise(), tmp_path, 0)
