"""The OPT network in eager PyTorch: a yardstick for speed, and the reference of the parity tests.

Written as one would write it in PyTorch, from OPT (arXiv 2107.00249, section 3) and BERT (arXiv 1810.04805):
linear layers with fused queries, keys and values, and the fastest exact attention of each device. Modules are
named as in the parameter tree, so that `copy_parameters` needs no table. Losses and optimizer: `torch_step`.
"""

from collections.abc import Mapping

import numpy as np

from opt_jax.models.opt import Sizes

try:
    import torch
    from torch import nn
    from torch.nn import functional
except ImportError as error:
    message = "the PyTorch side needs torch: pip install -e '.[torch]', or use --skip_torch"
    raise ImportError(message) from error

MASKED_LOGIT = -1e9
NAMES = ("text", "image", "audio")


def attend(q, k, v, bias, dropout: float):
    """Attention of q [B, H, Q, K] over k, v [B, H, S, K]; the bias, added, broadcasts to [B, H, Q, S]."""
    if dropout and q.device.type == "cpu":
        # With dropout the CPU has no fused kernel, and its fallback copies more than this does.
        logits = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)) + bias
        return functional.dropout(logits.softmax(-1), dropout) @ v
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), dropout_p=dropout)


def bias_of(mask, dtype):
    """0 where the bool mask is set, a very low logit elsewhere."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, MASKED_LOGIT)


class Layer(nn.Module):
    """One transformer layer, post-norm or pre-norm, with attention to a memory if `cross`."""

    def __init__(self, width, num_heads, mlp_size, epsilon, dropout, pre_norm, cross):
        super().__init__()
        self.num_heads, self.dropout, self.pre_norm, self.cross = num_heads, dropout, pre_norm, cross
        self.qkv = nn.Linear(width, 3 * width)
        self.self_out = nn.Linear(width, width)
        self.self_norm = nn.LayerNorm(width, epsilon)
        if cross:
            self.query = nn.Linear(width, width)
            self.memory = nn.Linear(width, 2 * width)
            self.cross_out = nn.Linear(width, width)
            self.cross_norm = nn.LayerNorm(width, epsilon)
        self.mlp_in = nn.Linear(width, mlp_size)
        self.mlp_out = nn.Linear(mlp_size, width)
        self.mlp_norm = nn.LayerNorm(width, epsilon)

    def heads(self, x, number):
        """[B, Q, number * D] to `number` tensors [B, H, Q, K]."""
        batch, length = x.shape[:2]
        return x.view(batch, length, number, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def drop(self, x):
        return functional.dropout(x, self.dropout, self.training)

    def attention(self, q, k, v, bias):
        return attend(q, k, v, bias, self.dropout if self.training else 0.0).transpose(1, 2).flatten(2)

    def self_attention(self, x, bias):
        return self.self_out(self.attention(*self.heads(self.qkv(x), 3), bias))

    def cross_attention(self, x, memory, bias):
        (q,), (k, v) = self.heads(self.query(x), 1), self.heads(self.memory(memory), 2)
        return self.cross_out(self.attention(q, k, v, bias))

    def residual(self, norm, x, block, *args):
        if self.pre_norm:
            return x + self.drop(block(norm(x), *args))
        return norm(x + self.drop(block(x, *args)))

    def mlp(self, x):
        return self.mlp_out(functional.gelu(self.mlp_in(x)))

    def forward(self, x, bias, memory=None, memory_bias=None):
        x = self.residual(self.self_norm, x, self.self_attention, bias)
        if self.cross:
            x = self.residual(self.cross_norm, x, self.cross_attention, memory, memory_bias)
        return self.residual(self.mlp_norm, x, self.mlp)


class Stack(nn.Module):
    def __init__(self, config, part, cross=False):
        super().__init__()
        width, epsilon = config["hidden_size"], config["layer_norm_epsilon"]
        sizes = (width, part["num_heads"], part["mlp_size"], epsilon, config["dropout"], config["pre_norm"])
        self.blocks = nn.ModuleList(Layer(*sizes, cross) for _ in range(part["num_layers"]))
        self.final_norm = nn.LayerNorm(width, epsilon) if config["pre_norm"] else nn.Identity()

    def forward(self, x, bias, memory=None, memory_bias=None, start=0, stop=None):
        for block in self.blocks[start:stop]:
            x = block(x, bias, memory, memory_bias)
        return x


def table(*shape):
    return nn.Parameter(torch.randn(shape) * 0.02)


class Embedder(nn.Module):
    def __init__(self, config, sizes: Sizes):
        super().__init__()
        width = config["hidden_size"]
        self.words = nn.Embedding(sizes.vocab_size, width)
        nn.init.normal_(self.words.weight, std=0.02)
        self.text_positions = table(config["max_text_positions"], width)
        self.audio_positions = table(config["max_audio_positions"], width)
        self.types = table(3, width)
        self.region_mask, self.audio_mask = table(1, sizes.region_size), table(1, sizes.audio_size)
        self.region_projection = nn.Linear(sizes.region_size, width)
        self.box_projection = nn.Linear(7, width)
        self.audio_projection = nn.Linear(sizes.audio_size, width)
        if window := config["frame_window"]:
            self.frame_convolution = nn.Conv1d(width, width, window, padding=window // 2)
        for name in ("text", "region", "box", "image", "frame", "audio"):
            setattr(self, f"{name}_norm", nn.LayerNorm(width, config["layer_norm_epsilon"]))
        self.dropout = nn.Dropout(config["dropout"])
        self.frame_window = config["frame_window"]

    def forward(self, batch):
        """The three modalities one after another, [B, S, D]."""
        ids = batch["text_ids"]
        text = self.text_norm(self.words(ids) + self.text_positions[: ids.shape[1]] + self.types[0])
        features = torch.where(batch["region_masked"][..., None], self.region_mask, batch["region_features"])
        boxes = self.box_norm(self.box_projection(batch["region_boxes"]))
        image = self.image_norm(self.region_norm(self.region_projection(features)) + boxes + self.types[1])
        frames = torch.where(batch["audio_masked"][..., None], self.audio_mask, batch["audio_features"])
        frames = self.frame_norm(self.audio_projection(frames))
        if self.frame_window:
            known = frames * batch["audio_valid"][..., None]
            frames = frames + functional.gelu(self.frame_convolution(known.mT).mT)
        audio = self.audio_norm(frames + self.audio_positions[: frames.shape[1]] + self.types[2])
        return self.dropout(torch.cat([text, image, audio], 1))


class CrossEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config["hidden_size"]
        self.num_alignment_layers = config["num_alignment_layers"]
        self.layers = Stack(config, config)
        if self.num_alignment_layers:
            self.alignment_norm = nn.LayerNorm(width, config["layer_norm_epsilon"])
            for name in NAMES:
                setattr(self, f"align_{name}", nn.Linear(width, config["alignment_size"]))
            self.agreement = nn.Linear(3, width)
            self.log_temperature = nn.Parameter(torch.tensor(float(np.log(config["temperature_init"]))))
            self.temperature_min = config["temperature_min"]

    def align(self, x, valid, groups):
        if not self.num_alignment_layers:
            return x
        mask = (groups[:, None] == groups) & valid[:, None]
        return self.layers(x, bias_of(mask[:, None], x.dtype), stop=self.num_alignment_layers)

    def embeddings(self, x, valid, groups):
        out = []
        for number, name in enumerate(NAMES):
            weight = (valid & (groups == number))[..., None].to(x.dtype)
            mean = (x * weight).sum(1) / weight.sum(1).clamp(min=1)
            projected = getattr(self, f"align_{name}")(self.alignment_norm(mean)).to(x.dtype)
            out.append(functional.normalize(projected, dim=-1, eps=1e-6))
        return out

    def temperature(self):
        return self.log_temperature.exp().clamp(min=self.temperature_min)

    def fuse(self, x, valid, groups):
        if self.num_alignment_layers:
            unit = self.embeddings(x, valid, groups)
            there = [(valid & (groups == number)).any(1) for number in range(3)]
            cosines = [
                (unit[a] * unit[b]).sum(1) * (there[a] & there[b]) for a, b in ((0, 1), (0, 2), (1, 2))
            ]
            told = self.agreement(torch.stack(cosines, 1) * unit[0].shape[1] ** 0.5)
            x = torch.cat([x[:, :1] + told[:, None], x[:, 1:]], 1)
        bias = bias_of(valid[:, None, None], x.dtype)
        return self.layers.final_norm(self.layers(x, bias, start=self.num_alignment_layers))


class Decoder(nn.Module):
    def __init__(self, config, part, size, length, own_table):
        super().__init__()
        width = config["hidden_size"]
        self.layers = Stack(config, part, cross=True)
        self.start, self.positions = table(1, width), table(length, width)
        self.embedding_norm = nn.LayerNorm(width, config["layer_norm_epsilon"])
        self.output_bias = nn.Parameter(torch.zeros(size))
        self.dropout = nn.Dropout(config["dropout"])
        if own_table:
            self.symbols = nn.Embedding(size, width)
            nn.init.normal_(self.symbols.weight, std=0.02)

    def forward(self, symbols, memory, valid, words=None):
        """Logits [B, N, size] of `symbols` [B, N] by teacher forcing."""
        words = self.symbols if words is None else words
        length = symbols.shape[1]
        x = torch.cat([self.start.expand(symbols.shape[0], 1, -1), words(symbols[:, :-1])], 1)
        x = self.dropout(self.embedding_norm(x + self.positions[:length]))
        causal = bias_of(torch.ones(length, length, dtype=torch.bool, device=x.device).tril(), x.dtype)
        x = self.layers(x, causal, memory, bias_of(valid[:, None, None], x.dtype))
        return functional.linear(self.layers.final_norm(x), words.weight, self.output_bias)


class Heads(nn.Module):
    def __init__(self, config, sizes: Sizes):
        super().__init__()
        width = config["hidden_size"]
        for name in ("word", "region", "region_class", "frame"):
            setattr(self, f"{name}_dense", nn.Linear(width, width))
            setattr(self, f"{name}_norm", nn.LayerNorm(width, config["layer_norm_epsilon"]))
        self.word_bias = nn.Parameter(torch.zeros(sizes.vocab_size))
        self.region_bias = nn.Parameter(torch.zeros(sizes.region_size))
        self.frame_bias = nn.Parameter(torch.zeros(sizes.audio_size))
        self.classes = nn.Linear(width, sizes.num_region_classes + 1)
        self.matching = nn.Linear(width, 5)

    def transform(self, name, x):
        return getattr(self, f"{name}_norm")(functional.gelu(getattr(self, f"{name}_dense")(x)))


class TorchOPT(nn.Module):
    """The network; `config` is the `model` part of a configuration, as for `opt_jax.models.opt.OPT`."""

    def __init__(self, config: Mapping, sizes: Sizes):
        super().__init__()
        self.embedder = Embedder(config, sizes)
        self.encoder = CrossEncoder(config)
        text, image = config["text_decoder"], config["image_decoder"]
        self.text_decoder = Decoder(config, text, sizes.vocab_size, config["max_text_positions"], False)
        self.image_decoder = Decoder(config, image, sizes.num_codes, sizes.codes_per_image, True)
        self.heads = Heads(config, sizes)

    def align(self, batch):
        """(states [B, S, D], valid [B, S], groups [S])."""
        valid = torch.cat([batch[f"{name}_valid"] for name in ("text", "region", "audio")], 1)
        lengths = [batch[f"{name}_valid"].shape[1] for name in ("text", "region", "audio")]
        groups = torch.arange(3).repeat_interleave(torch.tensor(lengths)).to(valid.device)
        groups[0] = 3  # [CLS] belongs to no modality
        return self.encoder.align(self.embedder(batch), valid, groups), valid, groups

    def word_logits(self, x):
        table = self.embedder.words.weight
        return functional.linear(self.heads.transform("word", x), table, self.heads.word_bias)

    def region_predictions(self, x):
        kernel = self.embedder.region_projection.weight
        return functional.linear(self.heads.transform("region", x), kernel.T, self.heads.region_bias)

    def frame_predictions(self, x):
        kernel = self.embedder.audio_projection.weight
        return functional.linear(self.heads.transform("frame", x), kernel.T, self.heads.frame_bias)

    def region_class_logits(self, x):
        return self.heads.classes(self.heads.transform("region_class", x))

    def matching_logits(self, memory):
        return self.heads.matching(memory[:, 0])

    def text_logits(self, symbols, memory, valid):
        return self.text_decoder(symbols, memory, valid, self.embedder.words)

    def image_logits(self, codes, memory, valid):
        return self.image_decoder(codes, memory, valid)


def copy_parameters(module: nn.Module, params: Mapping) -> None:
    """Puts the unboxed parameter tree of `opt_jax.models.opt.OPT` into `module`.

    Raises ValueError if the tree does not fill every parameter of the module.
    """
    with torch.no_grad():
        copied = _copy(module, params)
    total = sum(parameter.numel() for parameter in module.parameters())
    if copied != total:
        raise ValueError(f"{type(module).__name__}: the tree has {copied} numbers, the module {total}")


def _copy(module: nn.Module, tree: Mapping) -> int:
    count = 0
    for name, value in tree.items():
        if isinstance(module, Stack) and name != "final_norm":
            for i, block in enumerate(module.blocks):
                count += _copy(block, {name: {leaf: array[i] for leaf, array in value.items()}})
            continue
        target = getattr(module, name)
        if isinstance(target, nn.Linear):
            kernel = np.asarray(value["kernel"]).reshape(target.in_features, target.out_features)
            pairs = [(target.weight, kernel.T), (target.bias, np.asarray(value["bias"]).reshape(-1))]
        elif isinstance(target, nn.Conv1d):
            pairs = [(target.weight, np.asarray(value["kernel"]).T), (target.bias, value["bias"])]
        elif isinstance(target, nn.LayerNorm):
            pairs = [(target.weight, value["scale"]), (target.bias, value["bias"])]
        elif isinstance(target, nn.Embedding | nn.Parameter):
            pairs = [(target.weight if isinstance(target, nn.Embedding) else target, value)]
        else:
            pairs = []
            count += _copy(target, value)
        for parameter, array in pairs:
            parameter.copy_(torch.from_numpy(np.array(array)))
            count += parameter.numel()
    return count
