"""The three embedders and the cross-modal encoder (OPT, arXiv 2107.00249, sections 3.1 and 3.2).

The first `num_alignment_layers` layers attend within a modality only. Their output gives one embedding for
each modality; then [CLS] is told how well these agree, and the remaining layers attend to everything.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .layers_opt_jax import at_least_float32, attention_bias, make_final_norm, make_layers

MODALITIES = ("text", "image", "audio")
TEXT, IMAGE, AUDIO, CLS = range(4)  # groups of positions; [CLS] belongs to no modality
PAIRS = ((TEXT, IMAGE), (TEXT, AUDIO), (IMAGE, AUDIO))
BOX_SIZE = 7  # x1, y1, x2, y2, width, height, area, relative to the picture


class Embedder(nn.Module):
    """Words, regions and audio frames as positions of one sequence.

    Features come as the frozen encoders give them, and are standardised here by the mean and the deviation of
    the training data. A masked one is replaced by a learned vector.

    Both stay in float32 where the model is loaded with a half `dtype`, as a mean may be many deviations;
    `model.to(dtype)` would round them.
    """

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.words = nn.Embedding(config.vocab_size, width)
        self.text_positions = nn.Embedding(config.max_text_positions, width)
        self.types = nn.Embedding(len(MODALITIES), width)
        self.region_mask = nn.Embedding(1, config.region_size)
        self.region_projection = nn.Linear(config.region_size, width)
        self.box_projection = nn.Linear(BOX_SIZE, width)
        self.audio_mask = nn.Embedding(1, config.audio_size)
        self.audio_projection = nn.Linear(config.audio_size, width)
        self.audio_positions = nn.Embedding(config.max_audio_positions, width)
        self.frame_convolution = None
        if window := config.frame_window:
            self.frame_convolution = nn.Conv1d(width, width, window, padding=window // 2)
        for name in ("text", "region", "box", "image", "frame", "audio"):
            setattr(self, f"{name}_norm", nn.LayerNorm(width, config.layer_norm_epsilon))
        for name, size in (("region", config.region_size), ("audio", config.audio_size)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_deviation", torch.ones(size))
        self.dropout = nn.Dropout(config.dropout)

    def text(self, ids: Tensor) -> Tensor:
        """ids [B, T] to LN(word + position + type) [B, T, D]."""
        x = self.words(ids) + first(self.text_positions, ids.shape[1], "text") + self.types.weight[TEXT]
        return self.dropout(self.text_norm(x))

    def image(self, features: Tensor, boxes: Tensor, masked: Tensor | None) -> Tensor:
        """features [B, V, F], boxes [B, V, 7], masked [B, V] to LN(LN(W f) + LN(W7 box) + type) [B, V, D]."""
        features = standardised(features, self.region_mean, self.region_deviation)
        features = hidden(features, masked, self.region_mask.weight)
        x = self.region_norm(self.region_projection(features))
        x = x + self.box_norm(self.box_projection(boxes.to(features.dtype)))
        return self.dropout(self.image_norm(x + self.types.weight[IMAGE]))

    def audio(self, features: Tensor, valid: Tensor, masked: Tensor | None) -> Tensor:
        """features [B, A, F], valid and masked [B, A] to LN(LN(W f) + position + type) [B, A, D].

        With a frame window, GELU(a convolution over LN(W f)) is added.
        """
        features = standardised(features, self.audio_mean, self.audio_deviation)
        x = self.frame_norm(self.audio_projection(hidden(features, masked, self.audio_mask.weight)))
        if self.frame_convolution is not None:
            known = x.masked_fill(~valid[..., None], 0)
            x = x + functional.gelu(self.frame_convolution(known.mT).mT)
        x = x + first(self.audio_positions, x.shape[1], "audio") + self.types.weight[AUDIO]
        return self.dropout(self.audio_norm(x))


def first(positions: nn.Embedding, number: int, name: str) -> Tensor:
    """[number, D], the first rows of a table of positions."""
    if number > positions.num_embeddings:
        raise ValueError(f"{number} positions of {name}; the model has {positions.num_embeddings}")
    return positions.weight[:number]


def standardised(features: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """(features - mean) / deviation, in at least float32."""
    return (at_least_float32(features) - mean) / deviation


def hidden(features: Tensor, masked: Tensor | None, mask_embedding: Tensor) -> Tensor:
    """features [B, N, F] with the learned [1, F], in whose dtype they come back, in place of those that are
    `masked` [B, N]."""
    features = features.to(mask_embedding.dtype)
    return features if masked is None else torch.where(masked.bool()[..., None], mask_embedding, features)


def masked_mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean of x [B, N, D] over its valid [B, N] positions; zero where there is none."""
    weight = valid[..., None].to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


class CrossEncoder(nn.Module):
    """M = CrossEncoder([T; V; A]) in two parts: `align`, within each modality, then `fuse`, across them.

    All methods take states x [B, S, D], valid [B, S] bool, and groups [S]: the modality of each position.
    """

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.num_alignment_layers = config.num_alignment_layers
        self.temperature_min = config.temperature_min
        self.layers = make_layers(config, config.num_layers, config.num_heads, config.mlp_size)
        self.final_norm = make_final_norm(config)
        if self.num_alignment_layers:
            self.alignment_norm = nn.LayerNorm(width, config.layer_norm_epsilon)
            self.alignment_projections = nn.ModuleDict(
                {name: nn.Linear(width, config.alignment_size) for name in MODALITIES}
            )
            self.agreement = nn.Linear(len(PAIRS), width)
            self.log_temperature = nn.Parameter(torch.tensor(0.07).log())

    def align(self, x: Tensor, valid: Tensor, groups: Tensor, states: list | None = None) -> Tensor:
        """x through the alignment layers; a list given as `states` gets the output of each."""
        same = groups[:, None] == groups
        layers = self.layers[: self.num_alignment_layers]
        return self.run(layers, x, (same & valid[:, None])[:, None], states)

    def fuse(self, x: Tensor, valid: Tensor, groups: Tensor, states: list | None = None) -> Tensor:
        """M [B, S, D], the output of `align` through the remaining layers."""
        if self.num_alignment_layers:
            told = self.agreement(self.agreements(x, valid, groups).to(x.dtype))
            x = torch.cat([x[:, :1] + told[:, None], x[:, 1:]], 1)
        layers = self.layers[self.num_alignment_layers :]
        return self.final_norm(self.run(layers, x, valid[:, None, None], states))

    def run(self, layers, x: Tensor, allowed: Tensor, states: list | None) -> Tensor:
        bias = attention_bias(allowed)
        for layer in layers:
            x, _ = layer(x, bias)
            if states is not None:
                states.append(x)
        return x

    def embeddings(self, x: Tensor, valid: Tensor, groups: Tensor) -> dict[str, Tensor]:
        """One unit vector [B, E] for each modality, from the output of `align`."""
        found = {}
        for group, name in enumerate(MODALITIES):
            mean = self.alignment_norm(masked_mean(x, valid & (groups == group)))
            found[name] = functional.normalize(self.alignment_projections[name](mean), dim=-1, eps=1e-6)
        return found

    def agreements(self, x: Tensor, valid: Tensor, groups: Tensor) -> Tensor:
        """sqrt(E) times the cosines of the embeddings of each pair of modalities, [B, 3].

        The factor gives unrelated pairs about unit variance. 0 where one of the two is absent.
        """
        unit = list(self.embeddings(x, valid, groups).values())
        there = [(valid & (groups == group)).any(1) for group in range(len(MODALITIES))]
        cosines = [(unit[a] * unit[b]).sum(-1) * (there[a] & there[b]) for a, b in PAIRS]
        return torch.stack(cosines, -1) * unit[TEXT].shape[-1] ** 0.5

    def temperature(self) -> Tensor:
        """By which the cosines of embeddings are divided in the contrastive loss."""
        return self.log_temperature.exp().clamp(min=self.temperature_min)
