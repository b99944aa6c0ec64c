"""What the downstream tasks have in common: they show the model some modalities of each row, and train it on
the rest of what is known about it.

B rows of a batch, as the loader makes them (`opt_jax.data.loader`).
"""

import abc
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from opt_jax.data.loader import Loader
from opt_jax.data.triplet import Source
from opt_jax.evaluation.run import complete_rows, longest
from opt_jax.evaluation.scorers import FIELDS, Model
from opt_jax.models.inputs import standardise, uncorrupted
from opt_jax.models.opt import OPT
from opt_jax.step import Losses
from opt_jax.tasks import input_sets
from opt_jax.train import Task
from opt_jax.trained import Trained

TEXT, IMAGE, AUDIO = range(3)


class Downstream(abc.ABC):
    """One task, on one pre-trained model and one data set.

    Attributes:
      weights: of the losses that `losses` returns, by name.
      target: the modalities that a row must have beside those shown.
      config: as configs/finetune makes it. trained: the model to start from. sets: bool [n, 3], the input
        sets; draws: how often training draws each. loaders, sources: by split.
    """

    weights: Mapping[str, float]
    target: tuple[str, ...] = ()

    def __init__(
        self, config, trained: Trained, loaders: Mapping[str, Loader], sources: Mapping[str, Source]
    ):
        """Raises InputSetError for input sets that this task or these data do not have."""
        self.config, self.trained, self.loaders, self.sources = config, trained, loaders, sources
        self.sets = input_sets.parse(config.inputs)
        self.draws = [1.0] * len(self.sets)
        for name in self.target:
            if self.sets[:, input_sets.NAMES.index(name)].any():
                raise input_sets.InputSetError(
                    f"config.inputs {tuple(config.inputs)}: the {name} is what {config.task} is to make"
                )
        for split in ("train", "test"):
            wanted = self.sets | np.isin(input_sets.NAMES, self.target)
            # One by one for training; figures of several sets are of the same rows, which have them all.
            together = wanted.any(0, keepdims=True)
            input_sets.demand(np.concatenate([wanted, together]), loaders[split].cache.presence, split)
        settings = trained.config.model.to_dict() | {"dropout": config.dropout, "dtype": config.precision}
        self.network = OPT(settings, trained.model.model.sizes)

    # --- training ------------------------------------------------------------------------------------------

    def task(self) -> Task:
        """What `opt_jax.train.train` trains."""
        return Task(
            init=self.init,
            losses=functools.partial(self.losses, dropout=True),
            weights=self.weights,
            prepare=self.prepare,
            evaluate_losses=functools.partial(self.losses, dropout=False),
        )

    def initial(self) -> Any:
        """Parameters to start from; what they lack starts fresh."""
        return self.trained.model.params

    def init(self, key, batch) -> Any:
        batch = standardise(batch, self.trained.model.statistics)
        return self.network.init(key, uncorrupted(batch), batch["image_codes"])["params"]

    def prepare(self, key, batch):
        """The batch standardised, with `keep` [B, 3]: what is shown of each row, drawn among the sets."""
        batch = self.ready(batch)
        return batch | {"keep": input_sets.draw(key, self.sets, self.draws, batch["present"])}

    def ready(self, batch):
        """The batch standardised, without the positions of pictures or recordings that no set shows.

        Speech is two thirds of a row's positions: without it a step on texts and pictures is so much shorter.
        """
        unused = ~self.sets.any(0) & [False, True, True]  # texts are also what is to be written
        batch = standardise(batch, self.trained.model.statistics)
        for m in np.flatnonzero(unused):
            batch |= {name: x[:, :0] for name, x in batch.items() if name.startswith(FIELDS[m])}
        return batch | {"present": batch["present"] & (~unused | np.isin(input_sets.NAMES, self.target))}

    @abc.abstractmethod
    def losses(self, params, batch, key, step, dropout: bool) -> Losses:
        """(sum, count) by name over the rows of a prepared batch, as `opt_jax.step.Task` asks for them."""

    def apply(self, params, method: str, *args, **kwargs):
        return self.network.apply({"params": params}, *args, method=method, **kwargs)

    def encode(self, params, batch, key=None) -> tuple[jax.Array, jax.Array]:
        """(M [B, S, D], valid [B, S]) of what `keep` shows."""
        keep = tuple(batch["keep"][:, m : m + 1] for m in range(3))
        return self.apply(params, "encode", uncorrupted(batch, keep), key=key)

    def build(self, workdir: Path) -> None:
        """Makes in `workdir`, once, what the task wants beside the model: for most tasks nothing."""
        del workdir

    # --- evaluation ----------------------------------------------------------------------------------------

    def before(self, directory: Path) -> dict[str, float]:
        """Figures of the pre-trained model; {} where it cannot do the task yet."""
        return self.evaluate(self.trained.model.params, directory)

    @abc.abstractmethod
    def evaluate(self, params, directory: Path) -> dict[str, float]:
        """Figures of the test split, under the keys of results.json; writes examples into `directory`."""

    def model(self, params) -> Model:
        """The model with these parameters, to be asked."""
        return Model(self.network, params, self.trained.model.statistics)

    def rows(self, split: str, limit: int | None) -> np.ndarray:
        """Rows of a split that have all that is shown and made: all, or the first `limit` in `order`."""
        shown = [name for name, used in zip(input_sets.NAMES, self.sets.any(0), strict=True) if used]
        rows = complete_rows(self.loaders[split].cache, (*shown, *self.target))
        return rows if limit is None else self.order(rows)[:limit]

    def order(self, rows: np.ndarray) -> np.ndarray:
        """Rows in the order in which the first are taken for all: of a source, whose lists may go by speaker,
        place or class, drawn by a fixed seed; else as they are."""
        return np.random.default_rng(0).permutation(rows) if self.config.data.kind == "source" else rows

    def batches(self, split: str, rows: np.ndarray) -> list[dict[str, np.ndarray]]:
        loader = self.loaders[split]
        size = min(self.config.evaluation.batch_size, max(len(rows), 1))
        return list(loader.evaluation_batches(rows, size, longest(self.loaders, {split: rows})))
