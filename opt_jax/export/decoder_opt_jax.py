"""The text and the image decoder (OPT, arXiv 2107.00249, section 3.3): transformers over the encoder's M."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .layers_opt_jax import KeysValues, at_least_float32, attention_bias, make_final_norm, make_layers


class Decoder(nn.Module):
    """P(symbol_i | symbols_<i, M). A sequence starts with a learned vector, no symbol of the vocabulary.

    The output is tied to the table of embeddings [size, D]. That of image codes is `symbols`; the text
    decoder is given the words of the text embedder as `table`. Logits have at least float32.
    """

    def __init__(self, config, part: dict, size: int, length: int, own_table: bool):
        super().__init__()
        width = config.hidden_size
        self.layers = make_layers(config, **part, cross=True)
        self.final_norm = make_final_norm(config)
        self.start = nn.Embedding(1, width)
        self.positions = nn.Embedding(length, width)
        self.embedding_norm = nn.LayerNorm(width, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout)
        self.output_bias = nn.Parameter(torch.zeros(size))
        self.symbols = nn.Embedding(size, width) if own_table else None

    def memory(self, states: Tensor) -> list[KeysValues]:
        """Keys and values of M [B, S, D] for each layer, computed once for all steps."""
        return [layer.cross_attention.keys_values(states) for layer in self.layers]

    def forward(
        self, symbols: Tensor, memory: list[KeysValues], valid: Tensor, table: Tensor | None = None
    ) -> Tensor:
        """Teacher forcing: logits [B, N, size] of `symbols` [B, N], each from those before it and M.

        memory, valid: of the method `memory`, and [B, S] bool.
        """
        table = self.symbols.weight if table is None else table
        number = symbols.shape[1]
        start = self.start.weight.expand(len(symbols), 1, -1)
        x = torch.cat([start, functional.embedding(symbols[:, :-1], table)], 1)
        causal = torch.ones(number, number, dtype=torch.bool, device=x.device).tril()
        past = [None] * len(self.layers)
        return self.run(x, 0, attention_bias(causal), past, memory, valid, table)[0]

    def step(
        self,
        symbol: Tensor | None,
        past: list[KeysValues] | None,
        memory: list[KeysValues],
        valid: Tensor,
        table: Tensor | None = None,
    ) -> tuple[Tensor, list[KeysValues]]:
        """One step of decoding.

        Args:
          symbol: [B], the one before; None at the first step. past: of the step before; None at the first.
        Returns: logits [B, size] of the next symbol, and keys and values of all positions for each layer.
        """
        table = self.symbols.weight if table is None else table
        if symbol is None:
            x, position = self.start.weight.expand(len(valid), 1, -1), 0
            past = [None] * len(self.layers)
        else:
            x, position = functional.embedding(symbol[:, None], table), past[0][0].shape[2]
        logits, past = self.run(x, position, None, past, memory, valid, table)
        return logits[:, 0], past

    def run(self, x, position, bias, past, memory, valid, table) -> tuple[Tensor, list[KeysValues]]:
        """Logits of the positions x [B, Q, D], the first of which stands at `position`."""
        end, most = position + x.shape[1], self.positions.num_embeddings
        if end > most:
            raise ValueError(f"{end} symbols to decode; the model has positions for {most}")
        x = self.dropout(self.embedding_norm(x + self.positions.weight[position:end]))
        memory_bias, present = attention_bias(valid[:, None, None]), []
        for layer, layer_memory, layer_past in zip(self.layers, memory, past, strict=True):
            x, keys_values = layer(x, bias, layer_memory, memory_bias, layer_past)
            present.append(keys_values)
        return at_least_float32(functional.linear(self.final_norm(x), table, self.output_bias)), present
