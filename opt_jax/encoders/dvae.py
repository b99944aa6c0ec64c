"""The discrete variational autoencoder that turns a picture into a grid of codes and back.

The architecture is that of DALL-E's published dVAE ("Zero-Shot Text-to-Image Generation", arXiv 2102.12092,
section 2.1 and appendix A): bottleneck residual blocks in groups, with max-pooling between the encoder's
groups and nearest upsampling between the decoder's. Pictures are NHWC. The published sizes (4 groups, hidden
256, 2 blocks a group, 8192 codes, patches of one pixel) are configs/encoders/dvae.py:published.

With `patch_size` P > 1 the convolutions see P x P pixels as one position of 3 P^2 channels, and predict as
many: fewer groups then reach the same grid, without the layers of few channels at full resolution, which are
most of the time on a CPU and little of the arithmetic. With G groups a code stands for a square of
P 2^(G-1) pixels, a cell.

Parameters tell the sizes, so `encode` and `decode` need nothing beside them.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

PIXEL_MARGIN = 0.1  # keeps pixels off 0 and 1, where the logit-Laplace density has no logit (appendix A.3)
CHUNK = 25  # pictures to a compiled call
MEMORY = 512 << 20  # bytes of the largest array of a call


def map_pixels(pixels):
    """[0, 1] -> [0.1, 0.9]: the range in which the model sees and predicts pixels."""
    return (1 - 2 * PIXEL_MARGIN) * pixels + PIXEL_MARGIN


def unmap_pixels(pixels):
    """The inverse of `map_pixels`, clipped to [0, 1]."""
    return jnp.clip((pixels - PIXEL_MARGIN) / (1 - 2 * PIXEL_MARGIN), 0, 1)


def _conv(features: int, width: int, name: str) -> nn.Conv:
    # variance 1 / fan_in without truncation, zero bias: how the published model starts
    init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    return nn.Conv(features, (width, width), padding="SAME", kernel_init=init, name=name)


def _pool(x):
    """Max over 2x2: [B, H, W, C] -> [B, H/2, W/2, C]. As a reshape: its gradient on CPU is far faster."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


def _upsample(x):
    """Nearest: [B, H, W, C] -> [B, 2H, 2W, C]."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def to_patches(x, size: int):
    """[B, H, W, C] -> [B, H/size, W/size, size * size * C]."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels).swapaxes(2, 3)
    return x.reshape(batch, height // size, width // size, size * size * channels)


def from_patches(x, size: int):
    """The inverse of `to_patches`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, size, size, channels // size**2).swapaxes(2, 3)
    return x.reshape(batch, height * size, width * size, channels // size**2)


class Block(nn.Module):
    """id_path(x) + gain * four convolutions on x, of kernel widths `widths`, each after a ReLU.

    upsample: doubles height and width first. Nearest upsampling and 1x1 convolutions commute, so it is done
    after those on both paths (the first of `widths` must then be 1): the same function for less work.
    """

    features: int
    widths: tuple[int, int, int, int]
    gain: float
    upsample: bool = False

    @nn.compact
    def __call__(self, x):
        hidden = self.features // 4
        scale = _upsample if self.upsample else lambda y: y
        y = scale(_conv(hidden, self.widths[0], "conv_1")(nn.relu(x)))
        y = _conv(hidden, self.widths[1], "conv_2")(nn.relu(y))
        y = _conv(hidden, self.widths[2], "conv_3")(nn.relu(y))
        y = _conv(self.features, self.widths[3], "conv_4")(nn.relu(y))
        if x.shape[-1] != self.features:
            x = _conv(self.features, 1, "id_path")(x)
        return scale(x) + self.gain * y


class Encoder(nn.Module):
    """Mapped pixels [B, H, W, 3] -> logits over codes [B, H/cell, W/cell, vocab_size]."""

    vocab_size: int
    group_count: int
    n_hid: int
    n_blk_per_group: int
    patch_size: int
    input_width: int

    def setup(self):
        self.output = _conv(self.vocab_size, 1, "output")

    @nn.compact
    def features(self, pixels):
        """[B, H/cell, W/cell, n_hid 2^(G-1)], at least 0: what the logits are linear in."""
        x = _conv(self.n_hid, self.input_width, "input")(to_patches(pixels, self.patch_size))
        gain = 1 / (self.group_count * self.n_blk_per_group) ** 2
        for group in range(self.group_count):
            x = _pool(x) if group else x
            for block in range(self.n_blk_per_group):
                name = f"group_{group + 1}_block_{block + 1}"
                x = Block(2**group * self.n_hid, (3, 3, 3, 1), gain, name=name)(x)
        return nn.relu(x)

    def __call__(self, pixels):
        return self.output(self.features(pixels))


class Decoder(nn.Module):
    """Codes as (soft) one-hot vectors [B, h, w, vocab_size] -> mean (3) and log scale (3) [B, H, W, 6]."""

    vocab_size: int
    group_count: int
    n_hid: int
    n_blk_per_group: int
    patch_size: int
    n_init: int

    @nn.compact
    def __call__(self, codes):
        x = _conv(self.n_init, 1, "input")(codes)
        gain = 1 / (self.group_count * self.n_blk_per_group) ** 2
        for group in range(self.group_count):
            features = 2 ** (self.group_count - 1 - group) * self.n_hid
            for block in range(self.n_blk_per_group):
                name, grow = f"group_{group + 1}_block_{block + 1}", group > 0 and block == 0
                x = Block(features, (1, 3, 3, 3), gain, grow, name=name)(x)
        return from_patches(_conv(6 * self.patch_size**2, 1, "output")(nn.relu(x)), self.patch_size)


class DiscreteVAE(nn.Module):
    """Encoder and decoder. Fields as in configs/encoders/dvae.py."""

    vocab_size: int = 8192
    group_count: int = 4
    n_hid: int = 256
    n_blk_per_group: int = 2
    n_init: int = 128
    patch_size: int = 1
    input_width: int = 7

    def setup(self):
        sizes = (self.vocab_size, self.group_count, self.n_hid, self.n_blk_per_group, self.patch_size)
        self.encoder = Encoder(*sizes, self.input_width)
        self.decoder = Decoder(*sizes, self.n_init)

    def __call__(self, pixels, relax):
        """(logits of the encoder, (mean, log scale) of the decoder); `relax` turns logits into soft codes."""
        logits = self.encoder(pixels)
        return logits, self.decoder(relax(logits))

    @property
    def cell(self) -> int:
        """Width in pixels of what one code stands for."""
        return self.patch_size * 2 ** (self.group_count - 1)

    def features(self, pixels):
        return self.encoder.features(pixels)

    def logits(self, pixels):
        return self.encoder(pixels)

    def reconstruct(self, codes):
        return self.decoder(codes)


def model_of(params) -> DiscreteVAE:
    """The module that `params` belong to, its sizes read off their names and shapes.

    Raises:
        ValueError: `params` are not those of a dVAE.
    """
    try:
        encoder, decoder = params["encoder"], params["decoder"]
        groups = [name.split("_") for name in encoder if name.startswith("group_")]
        return DiscreteVAE(
            vocab_size=encoder["output"]["kernel"].shape[-1],
            group_count=max(int(group) for _, group, _, _ in groups),
            n_hid=encoder["input"]["kernel"].shape[-1],
            n_blk_per_group=max(int(block) for _, _, _, block in groups),
            n_init=decoder["input"]["kernel"].shape[-1],
            patch_size=round((encoder["input"]["kernel"].shape[-2] / 3) ** 0.5),
            input_width=encoder["input"]["kernel"].shape[0],
        )
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"these are not the parameters of a dVAE: {error!r}") from error


def encode(params, images) -> np.ndarray:
    """The most probable code of each cell.

    Args:
        params: as trained or loaded by `load_frozen`.
        images: uint8 [B, H, W, 3]; H and W multiples of the cell's width.

    Returns:
        int32 [B, h * w], row by row. A picture's codes do not depend on its batch: batches are cut and padded
        to one size, for which there is one program.

    Raises:
        ValueError: wrong dtype or shape.
    """
    return _look(_encode_chunk, params, images)


def features(params, images) -> np.ndarray:
    """The encoder's last map, of which the codes' logits are linear: float32 [B, h, w, n_hid 2^(G-1)], at
    least 0. As `encode` otherwise."""
    return _look(_features_chunk, params, images)


def _look(program, params, images) -> np.ndarray:
    model = model_of(params)
    images = np.asarray(images)
    cell = model.cell
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 [B, H, W, 3], found {images.dtype} {list(images.shape)}")
    if images.shape[1] % cell or images.shape[2] % cell:
        raise ValueError(
            f"{images.shape[1]}x{images.shape[2]} pixels: both sides must be multiples of {cell}"
        )
    largest = images.shape[1] * images.shape[2] // model.patch_size**2 * model.n_hid * 4
    return _in_chunks(partial(program, model, params), images, largest)


def decode(params, codes) -> np.ndarray:
    """Pictures from codes: the sigmoid of the predicted mean, unmapped.

    Args:
        params: as for `encode`.
        codes: integers [B, K], each below vocab_size, of a square grid (K = 64 for 8x8).

    Returns:
        uint8 [B, H, W, 3].

    Raises:
        ValueError: K is no square, or a code is out of range.
    """
    model = model_of(params)
    codes = np.asarray(codes, np.int32)
    side = round(codes.shape[-1] ** 0.5)
    if codes.ndim != 2 or side * side != codes.shape[1]:
        raise ValueError(f"codes must be [B, K] with K a square, found {list(codes.shape)}")
    if codes.size and not 0 <= codes.min() <= codes.max() < model.vocab_size:
        raise ValueError(f"codes from {codes.min()} to {codes.max()}; the codebook has {model.vocab_size}")
    largest = (side * model.cell // model.patch_size) ** 2 * model.n_hid * 4
    return _in_chunks(partial(_decode_chunk, model, params), codes.reshape(-1, side, side), largest)


def _in_chunks(program, rows: np.ndarray, size: int) -> np.ndarray:
    """The outputs of `program` on parts of `rows`, each of CHUNK or as many as keep the largest array, of
    `size` bytes a row, within MEMORY."""
    count = max(1, min(CHUNK, MEMORY // size))
    chunks = max(1, -(-len(rows) // count))
    padded = np.zeros((chunks * count, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    outputs = [program(chunk) for chunk in np.split(padded, chunks)]
    return np.concatenate([np.asarray(output) for output in outputs])[: len(rows)]


@partial(jax.jit, static_argnums=0)
def _encode_chunk(model: DiscreteVAE, params, images):
    pixels = map_pixels(images.astype(jnp.float32) / 255)
    logits = model.apply({"params": params}, pixels, method="logits")
    return jnp.argmax(logits, -1).astype(jnp.int32).reshape(len(images), -1)


@partial(jax.jit, static_argnums=0)
def _features_chunk(model: DiscreteVAE, params, images):
    pixels = map_pixels(images.astype(jnp.float32) / 255)
    return model.apply({"params": params}, pixels, method="features")


@partial(jax.jit, static_argnums=0)
def _decode_chunk(model: DiscreteVAE, params, codes):
    one_hot = jax.nn.one_hot(codes, model.vocab_size)
    mean = model.apply({"params": params}, one_hot, method="reconstruct")[..., :3]
    return jnp.round(unmap_pixels(jax.nn.sigmoid(mean)) * 255).astype(jnp.uint8)
