"""Drawing the picture of a triplet from its text, its speech or both (OPT, figure 3).

The image decoder of pre-training. Of each row several pictures are drawn, code by code among the most likely,
and the one is kept that fits best to the pre-trained model, shown what a detector or the grid sees in it: by
its matching head, and where there is a text by how likely that is to be written of the picture.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from opt_jax.data.triplet import Triplet
from opt_jax.encoders import dvae
from opt_jax.encoders.dvae_decoder import train_decoder
from opt_jax.encoders.frozen import digest, load_frozen, save_frozen
from opt_jax.evaluation import pretrained
from opt_jax.evaluation.examples import Examples
from opt_jax.evaluation.pictures import named_objects_found
from opt_jax.evaluation.run import longest
from opt_jax.evaluation.scorers import FIELDS, Model
from opt_jax.models.opt import lengths_of
from opt_jax.objectives.masked import accuracy, cross_entropy
from opt_jax.stages import run_stage
from opt_jax.tasks import input_sets
from opt_jax.tasks.downstream import IMAGE, TEXT, Downstream


class Drawing(Downstream):
    """Input sets without the picture."""

    weights = {"codes": 1.0}
    target = ("image",)

    def __init__(self, config, trained, loaders, sources):
        super().__init__(config, trained, loaders, sources)
        if trained.dvae is None:
            raise input_sets.InputSetError(f"{config.task} needs pictures with codes; these came as regions")
        self.dvae = trained.dvae

    def losses(self, params, batch, key, step, dropout):
        del step
        *keys, hidden_key = jax.random.split(key, 3) if dropout else (None, None, None)
        weight = batch["keep"].any(1, keepdims=True) & batch["present"][:, IMAGE, None]
        if dropout:  # some rows learn to be drawn of nothing, from which guidance leads away
            hidden = jax.random.bernoulli(hidden_key, self.config.hidden_fraction, (len(weight), 1))
            batch = batch | {"keep": batch["keep"] & ~hidden}
        memory, valid = self.encode(params, batch, keys[0])
        weight &= batch["image_codes"] >= 0
        codes = jnp.maximum(batch["image_codes"], 0)
        memory_kv = self.apply(params, "image_memory", memory)
        logits = self.apply(params, "image_logits", codes, memory_kv, valid, key=keys[1])
        loss = cross_entropy(logits, codes, weight, self.config.label_smoothing)
        return {"codes": loss, "code_accuracy": accuracy(logits, codes, weight)}

    def build(self, workdir):
        """A decoder of the codes that had more training, in `workdir`/dvae; what comes before is measured
        with that of the pre-training."""
        settings, place = self.config.picture_decoder, workdir / "dvae"
        if not settings.train.steps:
            return
        given, source = self.trained.encoders["dvae"], self.sources["train"]
        inputs = {"dvae": digest(given), "train": settings.train.to_dict(), "data": source.fingerprint()}

        def train(directory):
            config, metrics = load_frozen(given)[1], {}
            options = (config["image_size"], source, directory, self.config.seed, inputs["dvae"])
            save_frozen(directory, train_decoder(self.dvae, settings.train, *options), config, metrics)

        run_stage("picture decoder", place, inputs | {"seed": self.config.seed}, train)
        self.dvae, _ = load_frozen(place)

    def evaluate(self, params, directory):
        settings, source = self.config.evaluation, self.sources["test"]
        model, rows = self.model(params), self.rows("test", settings.pictures)
        lengths = longest(self.loaders, {"test": rows})
        (batch,) = self.loaders["test"].evaluation_batches(rows, len(rows), lengths)
        places = [int(place) for place in self.loaders["test"].cache.source_row[rows]]
        triplets = [source.read(place) for place in places]
        frozen = {name: load_frozen(path) for name, path in self.trained.encoders.items() if path}
        frozen["dvae"] = self.dvae, frozen["dvae"][1]
        results, pictures = {}, {}
        for keep in self.sets:
            name, keep = input_sets.named(keep), tuple(map(bool, keep))
            print(f"{self.config.task}: from {name.replace('_', ' and ')}", flush=True)
            codes = self.drawn(model, batch, triplets, keep)
            figures, pictures[name], reconstructed = named_objects_found(
                frozen, codes, batch["image_codes"], triplets
            )
            figures |= pretrained.code_accuracy(model, [batch], keep)
            figures["text_to_image/code_perplexity"] = perplexity(codes)
            results |= {f"{name}_{key.removeprefix('text_')}": value for key, value in figures.items()}
        examples = Examples(directory, source)
        for number, place in enumerate(places[: settings.examples]):
            drawn = {name: of_all[number] for name, of_all in pictures.items()}
            examples.generated(place, reconstructed[number], drawn)
        examples.write()
        return results

    def drawn(self, model, batch, triplets, keep) -> np.ndarray:
        """Codes [B, G]: of `evaluation.drawn` pictures for each row the one that matches best.

        Without guidance of the pre-trained model, which never learned to be shown nothing.
        """
        settings = self.config.evaluation
        guidance = 0.0 if model.params is self.trained.model.params else settings.guidance
        tries = [
            model.codes(batch, keep, settings.seed + number, top_k=settings.top_k, guidance=guidance)
            for number in range(settings.drawn)
        ]
        if settings.drawn == 1:
            return tries[0]
        query, asked = ("text", "caption") if keep[TEXT] else ("audio", "audio")
        empty = [dataclasses.replace(t, image=None, caption=None, audio=None) for t in triplets]
        alone = [
            dataclasses.replace(e, **{asked: getattr(t, asked)}) for e, t in zip(empty, triplets, strict=True)
        ]
        alone = self.trained.batch(alone)
        scores = np.stack([self.matches(codes, empty, alone, query) for codes in tries])
        return np.stack(tries)[scores.argmax(0), np.arange(len(triplets))]

    def matches(self, codes, empty: list[Triplet], alone, query: str) -> np.ndarray:
        """How well [B] each row's picture of codes [B, G] goes with its `query`, to the pre-trained model:
        fine-tuning teaches this one to draw only.

        `alone` is a batch of the queries, and `empty` triplets of nothing: with many pictures for each query
        it is not heard again for every one.
        """
        pictures = dvae.decode(self.dvae, codes)
        drawn = self.trained.batch(
            [dataclasses.replace(t, image=p) for t, p in zip(empty, pictures, strict=True)]
        )
        batch = alone | {name: x for name, x in drawn.items() if name.startswith(FIELDS[IMAGE])}
        batch |= {"present": alone["present"] | drawn["present"]}
        return fitting(self.trained.model, batch, query)


def fitting(model: Model, batch, query: str) -> np.ndarray:
    """How well [B] each row's picture goes with its own text or recording, `query`.

    Matching's logit is the logarithm of odds. To that of a text its log-likelihood given the picture is
    added, which tells each word apart; how likely the text is anyway is the same for all pictures of it.
    """
    rows = np.arange(len(batch["present"]))
    states, valid, _, alone = model.aligned(batch)
    lengths, own = lengths_of(batch), rows[:, None]
    scores = model.aligned_matching(states, valid, rows, own, (query,), "image", lengths)
    if query == "text":
        texts = batch["text_ids"][:, 1:], batch["text_valid"][:, 1:]
        scores = scores + model.aligned_likelihood(
            states, valid, alone, texts, rows, own, "image", True, lengths
        )
    return scores[:, 0]


def perplexity(codes: np.ndarray) -> float:
    """exp of the entropy of the codes' use; codes [B, G]."""
    shares = np.bincount(codes.ravel()) / codes.size
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))
