"""Transformer layers, with the norms before or after each block, and with a memory to attend to in decoders.

Letters in the docstrings of these files: B batch, T text positions (the first is [CLS]), V regions, A audio
positions, S = T + V + A, D width of the model, H heads, K = D / H, E width of an alignment embedding, W
words, C classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

KeysValues = tuple[Tensor, Tensor]  # [B, H, N, K] each

# Its exponential is 0 in every dtype, and float16 can hold it. Finite, so that a position which may attend to
# nothing, as those of an absent modality, gets some mean and not NaN.
MASKED_LOGIT = -3e4


def attention_bias(allowed: Tensor) -> Tensor:
    """float32, 0 where the bool `allowed` is set, a very low logit elsewhere."""
    return torch.zeros_like(allowed, dtype=torch.float32).masked_fill(~allowed, MASKED_LOGIT)


def at_least_float32(x: Tensor) -> Tensor:
    """As logits and predictions leave the model, so that losses and scores are not rounded."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Attention(nn.Module):
    """Attention with H heads of positions x to keys and values, which may be those of x itself."""

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        """[B, N, D] as [B, H, N, K]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def keys_values(self, x: Tensor) -> KeysValues:
        return self.split(self.key(x)), self.split(self.value(x))

    def forward(self, x: Tensor, keys_values: KeysValues, bias: Tensor | None = None) -> Tensor:
        """x [B, Q, D]; bias broadcasts to [B, H, Q, N]. Returns [B, Q, D]."""
        query = self.split(self.query(x))
        bias = None if bias is None else bias.to(query.dtype)
        dropout = self.dropout if self.training else 0.0
        x = functional.scaled_dot_product_attention(query, *keys_values, attn_mask=bias, dropout_p=dropout)
        return self.output(x.transpose(1, 2).flatten(2))


class Layer(GradientCheckpointingLayer):
    """Self-attention, with `cross` attention to a memory, and a feed-forward block."""

    def __init__(self, config, num_heads: int, mlp_size: int, cross: bool):
        super().__init__()
        width, epsilon = config.hidden_size, config.layer_norm_epsilon
        self.pre_norm = config.pre_norm
        self.dropout = nn.Dropout(config.dropout)
        self.self_attention = Attention(width, num_heads, config.dropout)
        self.self_attention_norm = nn.LayerNorm(width, epsilon)
        if cross:
            self.cross_attention = Attention(width, num_heads, config.dropout)
            self.cross_attention_norm = nn.LayerNorm(width, epsilon)
        self.mlp_in = nn.Linear(width, mlp_size)
        self.mlp_out = nn.Linear(mlp_size, width)
        self.mlp_norm = nn.LayerNorm(width, epsilon)

    def before(self, norm: nn.Module, x: Tensor) -> Tensor:
        """What a block reads."""
        return norm(x) if self.pre_norm else x

    def after(self, norm: nn.Module, x: Tensor, change: Tensor) -> Tensor:
        """x with what a block made of it added."""
        x = x + self.dropout(change)
        return x if self.pre_norm else norm(x)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        memory: KeysValues | None = None,
        memory_bias: Tensor | None = None,
        past: KeysValues | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """One layer on x [B, Q, D].

        Args:
          bias: broadcasts to [B, H, Q, N], N the past and present positions; None where all are seen.
          memory, memory_bias: keys and values of `cross_attention` for the memory, and [B, 1, 1, S].
          past: keys and values of the positions before x, which are attended as well.
        Returns: ([B, Q, D], keys and values of the past and present positions).
        """
        y = self.before(self.self_attention_norm, x)
        keys, values = self.self_attention.keys_values(y)
        if past is not None:
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        x = self.after(self.self_attention_norm, x, self.self_attention(y, (keys, values), bias))
        if memory is not None:
            y = self.before(self.cross_attention_norm, x)
            x = self.after(self.cross_attention_norm, x, self.cross_attention(y, memory, memory_bias))
        y = self.before(self.mlp_norm, x)
        x = self.after(self.mlp_norm, x, self.mlp_out(functional.gelu(self.mlp_in(y))))
        return x, (keys, values)


def make_layers(config, num_layers: int, num_heads: int, mlp_size: int, cross: bool = False) -> nn.ModuleList:
    return nn.ModuleList(Layer(config, num_heads, mlp_size, cross) for _ in range(num_layers))


def make_final_norm(config) -> nn.Module:
    """The norm that ends a pre-norm stack; a post-norm stack is normalised already."""
    return nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon) if config.pre_norm else nn.Identity()
