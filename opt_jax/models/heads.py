"""The heads over M: masked words, regions and frames, region classes, and five-way matching (OPT section 3.4;
UNITER)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from opt_jax.models.layers import dense, dense_init, gelu, layer_norm, norm_init, partitioned, product

NUM_MATCHING_CLASSES = 5


class Heads(nn.Module):
    """Each masked-modelling head is dense, GELU, norm, then an output; regression and words use tied,
    transposed weights."""

    hidden_size: int
    vocab_size: int
    region_size: int
    audio_size: int
    num_region_classes: int
    epsilon: float
    stddev: float

    def setup(self):
        d = self.hidden_size
        for name in ("word", "region", "region_class", "frame"):
            setattr(
                self,
                f"{name}_dense",
                self.param(f"{name}_dense", dense_init(self.stddev, (d, d), ("embed", "mlp"))),
            )
            setattr(self, f"{name}_norm", self.param(f"{name}_norm", norm_init((d,), ("embed",))))
        zeros = nn.initializers.zeros
        self.word_bias = self.param("word_bias", partitioned(zeros, (self.vocab_size,), ("vocab",)))
        self.region_bias = self.param("region_bias", partitioned(zeros, (self.region_size,), ("feature",)))
        self.frame_bias = self.param("frame_bias", partitioned(zeros, (self.audio_size,), ("feature",)))
        classes = dense_init(self.stddev, (d, self.num_region_classes + 1), ("embed", "class"))
        self.classes = self.param("classes", classes)
        self.matching = self.param(
            "matching", dense_init(self.stddev, (d, NUM_MATCHING_CLASSES), ("embed", "class"))
        )

    def transform(self, name: str, x: jax.Array) -> jax.Array:
        x = gelu(dense(getattr(self, f"{name}_dense"), x))
        return layer_norm(getattr(self, f"{name}_norm"), x, self.epsilon)

    def words(self, x, table):
        """x [..., D] and the word table [W, D] to logits [..., W]."""
        return wide(product(self.transform("word", x), table.T.astype(x.dtype))) + self.word_bias

    def regions(self, x, projection):
        """x [..., D] and the image projection's kernel [F, D] to standardised region features [..., F]."""
        return wide(product(self.transform("region", x), projection.T.astype(x.dtype))) + self.region_bias

    def frames(self, x, projection):
        """x [..., D] and the audio projection's kernel [F, D] to standardised frame features [..., F]."""
        return wide(product(self.transform("frame", x), projection.T.astype(x.dtype))) + self.frame_bias

    def region_classes(self, x):
        """x [..., D] to logits [..., 1 + C] over background (0) and the detector's classes."""
        return wide(dense(self.classes, self.transform("region_class", x)))

    def matching_logits(self, cls):
        """M at [CLS] [B, D] to five logits [B, 5]: all match, only V-A, only T-A, only T-V, none."""
        return wide(dense(self.matching, cls))


def wide(x: jax.Array) -> jax.Array:
    """Logits and regressions leave the model in at least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
