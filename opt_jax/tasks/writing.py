"""Writing the text of a triplet from the rest of it: captions and transcripts (OPT, tables 4 and 6).

The text decoder of pre-training, with label-smoothed cross-entropy; beam search when it is asked.
"""

import functools

import jax
import numpy as np

from opt_jax.data.triplet import Triplet
from opt_jax.evaluation import pretrained
from opt_jax.evaluation.caption_tokens import tokenize
from opt_jax.evaluation.captioning import caption_scores
from opt_jax.evaluation.cider import read_frequencies
from opt_jax.evaluation.examples import Examples
from opt_jax.evaluation.speech_recognition import normalise
from opt_jax.objectives.masked import cross_entropy
from opt_jax.tasks import input_sets
from opt_jax.tasks.downstream import AUDIO, TEXT, Downstream


class Writing(Downstream):
    """Input sets without the text; scored as captions, or in 'speech_recognition' as transcripts."""

    weights = {"text": 1.0}
    target = ("text",)

    def __init__(self, config, trained, loaders, sources):
        super().__init__(config, trained, loaders, sources)
        self.spoken = config.task == "speech_recognition"
        if self.spoken and not self.sets[:, AUDIO].all():
            raise input_sets.InputSetError(
                f"config.inputs {tuple(config.inputs)}: there is no speech recognition without A"
            )
        words = normalise if self.spoken else tokenize
        for triplet in self.tested[1]:
            texts = self.references(triplet)
            if not texts or not all(map(words, texts)):
                raise input_sets.InputSetError(
                    f"sample {triplet.id!r} of the test split has references {texts!r}, one of them without"
                    " words, against which nothing can be scored; mend the text, or leave the sample out"
                )

    @functools.cached_property
    def tested(self) -> tuple[np.ndarray, list[Triplet]]:
        """Rows [n] of the test split's cache, whose texts are asked for, and their triplets, texts only."""
        rows, source = self.rows("test", self.config.evaluation.texts), self.sources["test"]
        places = self.loaders["test"].cache.source_row[rows]
        return rows, [source.read(int(place), image=False, audio=False) for place in places]

    def references(self, triplet: Triplet) -> list[str]:
        """What a written text is scored against."""
        return [triplet.caption] if self.spoken else list(triplet.references)

    def losses(self, params, batch, key, step, dropout):
        del step
        keys = jax.random.split(key) if dropout else (None, None)
        memory, valid = self.encode(params, batch, keys[0])
        words = batch["text_ids"][:, 1:]
        asked = batch["keep"].any(1, keepdims=True) & batch["present"][:, TEXT, None]
        memory_kv = self.apply(params, "text_memory", memory)
        logits = self.apply(params, "text_logits", words, memory_kv, valid, key=keys[1])
        weight = batch["text_valid"][:, 1:] & asked
        return {"text": cross_entropy(logits, words, weight, self.config.label_smoothing)}

    def evaluate(self, params, directory):
        settings, source = self.config.evaluation, self.sources["test"]
        (rows, triplets), model = self.tested, self.model(params)
        batches = self.batches("test", rows)
        options = {"max_length": self.trained.config.evaluation.max_new_tokens, "beams": settings.beams}
        texts = {}
        for keep in self.sets:
            keep = tuple(map(bool, keep))
            name = input_sets.named(keep)
            print(f"{self.config.task}: from {name.replace('_', ' and ')}", flush=True)
            texts[name] = pretrained.write_texts(model, batches, keep, self.trained.tokenizer, **options)
        references = [self.references(triplet) for triplet in triplets]
        if self.spoken:
            spoken = {"image_audio": "audio_image"}
            transcripts = {spoken.get(name, name): written for name, written in texts.items()}
            truths = [truth for (truth,) in references]
            caches = [self.loaders[split].cache for split in ("test", "train")]
            parts = pretrained.seen_and_unseen(caches[0].caption_keys[rows], caches[1].caption_keys)
            results = pretrained.speech_recognition(transcripts, truths, settings.pools, parts)
        else:
            named = settings.document_frequencies
            frequencies = read_frequencies(named) if named else None
            results = {
                f"captioning/{name}/{score}": value
                for name, written in texts.items()
                for score, value in caption_scores(written, references, frequencies).items()
            }
        examples, places = Examples(directory, source), self.loaders["test"].cache.source_row[rows]
        for number, place in enumerate(places[: settings.examples]):
            written = {name: texts[name][number] for name in texts}
            if self.spoken:
                examples.transcript(int(place), written)
            else:
                shown = [name for name, used in zip(input_sets.NAMES, self.sets.any(0), strict=True) if used]
                examples.caption(int(place), written, shown)
        examples.write()
        return results
