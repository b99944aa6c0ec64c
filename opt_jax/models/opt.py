"""OPT, the Omni-Perception Pre-Trainer (arXiv 2107.00249): one encoder-decoder over text, image regions and
audio frames.

Every method is called as `model.apply({'params': params}, ..., method='encode')`. `inputs` is a dict of

    text_ids [B, T] int, text_valid [B, T] bool            position 0 is [CLS], valid in every row
    region_features [B, V, F], region_boxes [B, V, 7], region_masked [B, V] bool, region_valid [B, V] bool
    audio_features [B, A, F], audio_masked [B, A] bool, audio_valid [B, A] bool

with features standardised. `*_valid` says what may be attended: padding and absent modalities are False.
`*_masked` positions are attended, but their feature is replaced by the mask embedding.
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import freeze

from opt_jax.models.cross_encoder import CrossEncoder, group_ids
from opt_jax.models.decoders import Decoder
from opt_jax.models.embeddings import Embedder
from opt_jax.models.heads import Heads

Inputs = Mapping[str, jax.Array]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16, "float64": jnp.float64}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the data decides: vocabulary, feature widths, region classes (without background), and the
    picture's codes."""

    vocab_size: int
    region_size: int
    audio_size: int
    num_region_classes: int
    num_codes: int
    codes_per_image: int


def lengths_of(inputs: Inputs) -> tuple[int, int, int]:
    """(T, V, A) of a batch."""
    return tuple(inputs[name].shape[1] for name in ("text_valid", "region_valid", "audio_valid"))


class OPT(nn.Module):
    """The whole model. `config` is the `model` part of a configuration file, `sizes` comes from the feature
    cache."""

    config: Mapping
    sizes: Sizes

    def __post_init__(self):
        # A frozen configuration makes the model hashable, and so a static argument of `jax.jit`.
        object.__setattr__(self, "config", freeze(self.config))
        super().__post_init__()

    def setup(self):
        c, s = self.config, self.sizes
        shared = {"epsilon": c["layer_norm_epsilon"], "stddev": c["initializer_range"]}
        layers = shared | {
            "hidden_size": c["hidden_size"],
            "pre_norm": c["pre_norm"],
            "dropout_rate": c["dropout"],
            "remat": c["remat"],
            "unroll": c["unroll"],
        }

        def stack(part):
            return layers | {name: part[name] for name in ("num_layers", "num_heads", "mlp_size")}

        self.embedder = Embedder(
            hidden_size=c["hidden_size"],
            vocab_size=s.vocab_size,
            region_size=s.region_size,
            audio_size=s.audio_size,
            max_text_positions=c["max_text_positions"],
            max_audio_positions=c["max_audio_positions"],
            frame_window=c["frame_window"],
            dropout_rate=c["dropout"],
            **shared,
        )
        self.encoder = CrossEncoder(
            num_alignment_layers=c["num_alignment_layers"],
            alignment_size=c["alignment_size"],
            temperature_init=c["temperature_init"],
            temperature_min=c["temperature_min"],
            stack=stack(c),
        )
        self.text_decoder = Decoder(s.vocab_size, c["max_text_positions"], False, stack(c["text_decoder"]))
        self.image_decoder = Decoder(s.num_codes, s.codes_per_image, True, stack(c["image_decoder"]))
        self.heads = Heads(
            hidden_size=c["hidden_size"],
            vocab_size=s.vocab_size,
            region_size=s.region_size,
            audio_size=s.audio_size,
            num_region_classes=s.num_region_classes,
            **shared,
        )

    @property
    def dtype(self):
        return DTYPES[self.config["dtype"]]

    def __call__(self, inputs: Inputs, codes: jax.Array) -> None:
        """Touches every parameter once, which is what initialisation needs."""
        memory, valid = self.encode(inputs)
        if self.config["num_alignment_layers"]:
            self.embeddings(*self.align(inputs), lengths_of(inputs))
        self.text_logits(inputs["text_ids"][:, 1:], self.text_memory(memory), valid)
        self.image_logits(codes, self.image_memory(memory), valid)
        self.word_logits(memory)
        self.region_predictions(memory)
        self.frame_predictions(memory)
        self.region_class_logits(memory)
        self.matching_logits(memory)

    # --- encoder -------------------------------------------------------------------------------------------

    def align(self, inputs: Inputs, key=None) -> tuple[jax.Array, jax.Array]:
        """Embeds and runs the alignment layers: (states [B, S, D], valid [B, S])."""
        keys = [None] * 4 if key is None else jax.random.split(key, 4)
        text = self.embedder.text(inputs["text_ids"], keys[0], self.dtype)
        image = self.embedder.image(
            inputs["region_features"], inputs["region_boxes"], inputs["region_masked"], keys[1], self.dtype
        )
        audio = self.embedder.audio(
            inputs["audio_features"], inputs["audio_masked"], inputs["audio_valid"], keys[2], self.dtype
        )
        valid = jnp.concatenate([inputs["text_valid"], inputs["region_valid"], inputs["audio_valid"]], axis=1)
        groups = group_ids(text.shape[1], image.shape[1], audio.shape[1])
        states = jnp.concatenate([text, image, audio], axis=1)
        return self.encoder.align(states, valid, groups, keys[3]), valid

    def embeddings(self, states, valid, lengths: tuple[int, int, int]) -> dict[str, jax.Array]:
        """Unit vectors {'text', 'image', 'audio'} [B, E] from the output of `align`; lengths = (T, V, A)."""
        return self.encoder.embeddings(states, valid, group_ids(*lengths))

    def temperature(self) -> jax.Array:
        return self.encoder.temperature()

    def fuse(self, states, valid, lengths: tuple[int, int, int], key=None) -> jax.Array:
        """The output of `align` through the fusion layers: M [B, S, D]; lengths = (T, V, A)."""
        return self.encoder.fuse(states, valid, group_ids(*lengths), key)

    def encode(self, inputs: Inputs, key=None) -> tuple[jax.Array, jax.Array]:
        """(M [B, S, D], valid [B, S]) of any subset of modalities."""
        keys = (None, None) if key is None else jax.random.split(key)
        states, valid = self.align(inputs, keys[0])
        return self.fuse(states, valid, lengths_of(inputs), keys[1]), valid

    # --- decoders ------------------------------------------------------------------------------------------

    def text_memory(self, memory):
        """Keys and values of M for the text decoder: [L, B, S, 2, H, K]."""
        return self.text_decoder.memory(memory)

    def text_logits(self, symbols, memory_kv, memory_valid, key=None):
        """Logits [B, T, W] of `symbols` [B, T] (words and [SEP], without [CLS]), each from those before it
        and M."""
        return self.text_decoder(symbols, memory_kv, memory_valid, self.embedder.words, key)

    def text_by_layer(self, memory_kv):
        return self.text_decoder.by_layer(memory_kv, self.embedder.words)

    def text_step(self, symbol, position, cache, memory_kv, memory_valid, origin=None):
        words = self.embedder.words
        return self.text_decoder.step(symbol, position, cache, memory_kv, memory_valid, words, origin)

    def image_memory(self, memory):
        """Keys and values of M for the image decoder: [L, B, S, 2, H, K]."""
        return self.image_decoder.memory(memory)

    def image_logits(self, codes, memory_kv, memory_valid, key=None):
        """Logits [B, G, num_codes] of the picture's codes [B, G] in raster order, each from those before it
        and M."""
        return self.image_decoder(codes, memory_kv, memory_valid, key=key)

    def image_by_layer(self, memory_kv):
        return self.image_decoder.by_layer(memory_kv)

    def image_step(self, symbol, position, cache, memory_kv, memory_valid, origin=None):
        return self.image_decoder.step(symbol, position, cache, memory_kv, memory_valid, origin=origin)

    def empty_cache(self, what, batch, length, dtype, number=1):
        """An empty key-value cache for `length` steps of the 'text' or 'image' decoder."""
        decoder = {"text": self.text_decoder, "image": self.image_decoder}[what]
        return decoder.empty_cache(batch, length, dtype, number)

    # --- heads ---------------------------------------------------------------------------------------------

    def word_logits(self, x):
        return self.heads.words(x, self.embedder.words)

    def region_predictions(self, x):
        return self.heads.regions(x, self.embedder.region_projection["kernel"])

    def frame_predictions(self, x):
        return self.heads.frames(x, self.embedder.audio_projection["kernel"])

    def region_class_logits(self, x):
        return self.heads.region_classes(x)

    def matching_logits(self, memory):
        """Five logits [B, 5] from M [B, S, D] at [CLS]."""
        return self.heads.matching_logits(memory[:, 0])

    def matching_scores(self, inputs: Inputs) -> jax.Array:
        """Probabilities [B, 5] of the five sigmoids: all match, only V-A, only T-A, only T-V, none.

        Of two modalities only their own class and the last mean something.
        """
        return jax.nn.sigmoid(self.matching_logits(self.encode(inputs)[0]))
