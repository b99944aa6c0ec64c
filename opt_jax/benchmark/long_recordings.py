"""What windows cost a long recording: `python -m opt_jax.benchmark.long_recordings --run=runs/tiny`.

Clips of the test split are joined to recordings of some minutes and read by the run's wav2vec 2.0: whole, and
in windows of several lengths and contexts. Printed are the word error rate, how far the features are from
those of the whole recording (root mean square, as a share of their deviation), seconds, and the peak memory.
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np

from opt_jax.data.spoken_scenes.source import SpokenScenes
from opt_jax.encoders.frozen import load_frozen
from opt_jax.encoders.wav2vec2 import SAMPLE_RATE
from opt_jax.encoders.wav2vec2_extraction import Extractor
from opt_jax.encoders.wav2vec2_objectives import greedy_decode
from opt_jax.evaluation.speech_recognition import error_rates

SETTINGS = ((10.0, 0.5), (10.0, 2.0), (30.0, 0.5), (30.0, 2.0))


def recordings(source, count: int, seconds: float) -> list[tuple[np.ndarray, str]]:
    """`count` recordings of at least `seconds` and what is said in them."""
    found, index = [], 0
    pause = np.zeros(SAMPLE_RATE // 4, np.float32)
    while len(found) < count:
        parts, words = [], []
        while sum(map(len, parts)) < seconds * SAMPLE_RATE:
            sample = source[index % len(source)]
            parts += [sample.audio, pause]
            words.append(sample.caption)
            index += 1
        found.append((np.concatenate(parts), " ".join(words)))
    return found


def main(arguments=None) -> list[dict]:
    parser = argparse.ArgumentParser("opt_jax.benchmark.long_recordings", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a work directory of opt_jax.main")
    parser.add_argument("--count", type=int, default=8, help="recordings")
    parser.add_argument("--seconds", type=float, default=180.0, help="of each recording")
    flags = parser.parse_args(arguments)
    params, config = load_frozen(flags.run / "encoders" / "wav2vec2")
    spoken = recordings(SpokenScenes(flags.run / "data", "test"), flags.count, flags.seconds)
    whole = (max(len(clip) for clip, _ in spoken) / SAMPLE_RATE + 1, 0.0)
    results, features = [], {}
    for seconds, context in (*SETTINGS, whole):
        extractor = Extractor(params, config, window_seconds=seconds, context_seconds=context)
        start, hypotheses, states = time.perf_counter(), [], []
        for clip, _ in spoken:
            logits, counts = extractor.logits(clip[None], np.array([len(clip)]))
            hypotheses += greedy_decode(np.asarray(logits), np.asarray(counts), config["vocabulary"])
            found, _ = extractor.extract(clip[None], np.array([len(clip)]))
            states.append(np.asarray(found)[0, : int(counts[0])])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rates = error_rates([words for _, words in spoken], hypotheses)
        row = dict(window=seconds, context=context, seconds=time.perf_counter() - start, peak=peak)
        results.append(row | dict(wer=rates["WER"]))
        features[seconds, context] = np.concatenate(states)
    reference = features[whole]
    print(f"{flags.count} recordings of {flags.seconds:g} s; the last row is each recording whole")
    print("window  context  word errors  features off by  time      peak memory so far")
    for row, found in zip(results, features.values(), strict=True):
        row["off"] = float(np.sqrt(np.mean((found - reference) ** 2)) / reference.std())
        print(
            f"{row['window']:5.0f} s {row['context']:6.1f} s {row['wer']:10.2f} % {row['off']:14.2%}"
            f" {row['seconds']:8.1f} s {row['peak']:8.2f} GiB"
        )
    return results


if __name__ == "__main__":
    main()
