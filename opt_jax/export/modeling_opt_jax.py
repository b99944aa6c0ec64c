"""OPT, the Omni-Perception Pre-Trainer (arXiv 2107.00249): one model for text, pictures and speech.

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    output = model(input_ids=..., region_features=..., region_boxes=..., audio_features=...)
    ids, log_probability = model.generate_text(output, num_beams=3)
    codes, log_probability = model.generate_image_codes(output, top_k=32)

    output = model(region_features=..., region_boxes=..., labels=...)  # output.loss to train by

Any of the three modalities may be left out. All of the model is on one device. Letters of the docstrings are
those of `layers_opt_jax`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_opt_jax import IGNORED, OptJaxConfig
from .decoder_opt_jax import Decoder
from .encoder_opt_jax import (
    AUDIO,
    BOX_SIZE,
    CLS,
    IMAGE,
    MODALITIES,
    TEXT,
    CrossEncoder,
    Embedder,
    masked_mean,
)
from .generation_opt_jax import counted, padded_after, sample, search
from .layers_opt_jax import at_least_float32
from .losses_opt_jax import check_classes, check_symbols, class_loss, symbol_loss

NUM_MATCHING_CLASSES = 5
TEMPERATURE = 0.07  # of the contrast in fresh weights
SAMPLING = ("temperature", "top_k", "top_p", "generator")
GENERATION = ("max_length", "num_beams", "length_penalty", "do_sample", *SAMPLING)  # of `generate_text`


@dataclass
class OptJaxOutput(ModelOutput):
    """What the model makes of its inputs; None for what was not asked for. Logits have at least float32.

    Attributes:
      loss: of `labels` and `image_codes`, each the mean over its symbols, and of `class_labels`, added.
      last_hidden_state: M [B, S, D], positions of text, regions and audio one after another.
      attention_mask: bool [B, S], positions of M that are neither padding nor absent.
      matching_logits: [B, 5]; sigmoids are the probabilities that all match, only picture and speech, only
        text and speech, only text and picture, none. Of two modalities only their own and the last count.
      text_embeds, image_embeds, audio_embeds: unit vectors [B, E] for retrieval, of what is given.
      logits: [B, C] of the fine-tuned classifier; sigmoids are the probabilities.
      text_logits, image_logits: [B, N, W] of `labels`, [B, G, codes] of `image_codes`.
      hidden_states: [B, S, D], the embedded inputs and the output of each layer, before the final norm.
    """

    loss: Tensor | None = None
    last_hidden_state: Tensor | None = None
    attention_mask: Tensor | None = None
    matching_logits: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    audio_embeds: Tensor | None = None
    logits: Tensor | None = None
    text_logits: Tensor | None = None
    image_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class Heads(nn.Module):
    """Heads over M: masked words, regions, frames, region classes, and matching."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        for name in ("word", "region", "region_class", "frame"):
            setattr(self, f"{name}_dense", nn.Linear(width, width))
            setattr(self, f"{name}_norm", nn.LayerNorm(width, config.layer_norm_epsilon))
        self.word_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.region_bias = nn.Parameter(torch.zeros(config.region_size))
        self.frame_bias = nn.Parameter(torch.zeros(config.audio_size))
        self.classes = nn.Linear(width, config.num_region_classes + 1)
        self.matching = nn.Linear(width, NUM_MATCHING_CLASSES)

    def transform(self, name: str, x: Tensor) -> Tensor:
        return getattr(self, f"{name}_norm")(functional.gelu(getattr(self, f"{name}_dense")(x)))


class OptJaxModel(PreTrainedModel):
    """The whole network: embedders, cross-modal encoder, text and image decoder, heads."""

    config_class = OptJaxConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["region_mean", "region_deviation", "audio_mean", "audio_deviation"]
    _supports_sdpa = True

    def __init__(self, config: OptJaxConfig):
        super().__init__(config)
        self.embedder = Embedder(config)
        self.encoder = CrossEncoder(config)
        self.heads = Heads(config)
        self.text_decoder = self.image_decoder = self.classifier = None
        if part := config.text_decoder:
            self.text_decoder = Decoder(config, part, config.vocab_size, config.max_text_positions, False)
        if part := config.image_decoder:
            self.image_decoder = Decoder(config, part, config.num_codes, config.codes_per_image, True)
        if config.num_classes:
            self.classifier = nn.Linear(4 * config.hidden_size, config.num_classes)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Fresh weights, for whatever a folder lacks: as of all models of transformers, and of parameters and
        buffers that no such module holds."""
        super()._init_weights(module)
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if name.endswith(("_bias", "_mean")):
                nn.init.zeros_(tensor)
            elif name.endswith("_deviation"):
                nn.init.ones_(tensor)
            elif name == "log_temperature":
                nn.init.constant_(tensor, math.log(TEMPERATURE))
        if module is self.classifier:
            # A label in so many is likely: else the first steps go into pushing all of them down.
            nn.init.constant_(module.bias, -math.log(max(self.config.num_classes - 1, 1)))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedder.words

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        region_features: Tensor | None = None,
        region_boxes: Tensor | None = None,
        region_attention_mask: Tensor | None = None,
        region_masked: Tensor | None = None,
        audio_features: Tensor | None = None,
        audio_attention_mask: Tensor | None = None,
        audio_masked: Tensor | None = None,
        labels: Tensor | None = None,
        image_codes: Tensor | None = None,
        class_labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> OptJaxOutput | tuple:
        """Encodes the modalities that are given, and decodes `labels` and `image_codes` by teacher forcing.

        Args:
          input_ids: int [B, T], [CLS] first; without it [CLS] stands alone. region_features, region_boxes:
            [B, V, F] and [B, V, 7]. audio_features: [B, A, F]. All as the frozen encoders give them.
          *attention_mask: bool or 0 and 1, False for padding and for rows without that modality; by default
            all is seen. [CLS] is seen in every row, whatever its mask says.
          *_masked: bool, features to replace by the learned mask.
          labels: int [B, N], a text to write: words and [SEP] without [CLS], -100 behind its end.
          image_codes: int [B, G], the codes of a picture to draw, in raster order; -100 is left out.
          class_labels: [B, C], 1 for each class that a row is of; a row of zeros is left out. Needs a
            classifier: that of a fine-tuning, or a fresh one by from_pretrained(folder, num_labels=C).
          output_hidden_states, return_dict: by default as the configuration says; return_dict=False asks for
            a tuple of what the output holds, in its order.

        Raises: ValueError: nothing is given; labels, codes or classes have a shape that they cannot have, or
          are -100 everywhere (which is looked for on the CPU alone).
        """
        config = self.config
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict
        texts = input_ids, attention_mask
        regions = region_features, region_boxes, region_attention_mask, region_masked
        frames = audio_features, audio_attention_mask, audio_masked
        x, valid, groups = self.embed(texts, regions, frames)
        check_symbols("labels", labels, len(x), config.max_text_positions)
        check_symbols("image_codes", image_codes, len(x), config.codes_per_image)
        check_classes(class_labels, len(x), config.num_classes)
        states = [x] if output_hidden_states else None
        x = self.encoder.align(x, valid, groups, states)
        embeds = self.encoder.embeddings(x, valid, groups) if config.num_alignment_layers else {}
        memory = self.encoder.fuse(x, valid, groups, states)
        given = dict(zip(MODALITIES, (input_ids, region_features, audio_features), strict=True))
        output = OptJaxOutput(
            last_hidden_state=memory,
            attention_mask=valid,
            matching_logits=self.matching_logits(memory),
            logits=None if self.classifier is None else self.class_logits(memory, valid, groups),
            hidden_states=None if states is None else tuple(states),
            **{f"{name}_embeds": embeds[name] for name in embeds if given[name] is not None},
        )
        losses = []
        if labels is not None:
            symbols = labels.masked_fill(labels == IGNORED, config.pad_token_id)
            output.text_logits = self.text_logits(symbols, memory, valid)
            losses.append(symbol_loss(output.text_logits, labels))
        if image_codes is not None:
            output.image_logits = self.image_logits(image_codes.clamp(min=0), memory, valid)
            losses.append(symbol_loss(output.image_logits, image_codes))
        if class_labels is not None:
            losses.append(class_loss(output.logits, class_labels))
        output.loss = sum(losses) if losses else None
        return output if return_dict else output.to_tuple()

    def embed(self, texts: tuple, regions: tuple, frames: tuple) -> tuple[Tensor, Tensor, Tensor]:
        """(states [B, S, D], valid bool [B, S], groups [S]) of (input_ids, mask), (region_features, boxes,
        mask, masked) and (audio_features, mask, masked), as `forward` has them; any may be None."""
        (ids, text_mask), (regions, boxes, region_mask, region_masked) = texts, regions
        frames, audio_mask, audio_masked = frames
        given = next((part for part in (ids, regions, frames) if part is not None), None)
        if given is None:
            raise ValueError("give input_ids, region_features or audio_features")
        if ids is None:
            ids = torch.full((len(given), 1), self.config.cls_token_id, device=given.device)
            text_mask = None
        parts, valid, groups = [self.embedder.text(ids)], [seen(text_mask, ids)], [TEXT] * ids.shape[1]
        valid[0][:, 0], groups[0] = True, CLS
        if regions is not None:
            if boxes is None or boxes.shape[-1] != BOX_SIZE:
                raise ValueError("region_features need region_boxes [B, V, 7]")
            parts.append(self.embedder.image(regions, boxes, region_masked))
            valid.append(seen(region_mask, regions))
            groups += [IMAGE] * regions.shape[1]
        if frames is not None:
            valid.append(seen(audio_mask, frames))
            parts.append(self.embedder.audio(frames, valid[-1], audio_masked))
            groups += [AUDIO] * frames.shape[1]
        return torch.cat(parts, 1), torch.cat(valid, 1), torch.tensor(groups, device=ids.device)

    # --- heads ---------------------------------------------------------------------------------------------

    def word_logits(self, x: Tensor) -> Tensor:
        """[..., W] of M [..., D] at masked words."""
        x, words = self.heads.transform("word", x), self.embedder.words.weight
        return at_least_float32(functional.linear(x, words, self.heads.word_bias))

    def region_predictions(self, x: Tensor) -> Tensor:
        """Standardised features [..., F] of M [..., D] at masked regions."""
        x, projection = self.heads.transform("region", x), self.embedder.region_projection.weight
        return at_least_float32(functional.linear(x, projection.T, self.heads.region_bias))

    def frame_predictions(self, x: Tensor) -> Tensor:
        """Standardised features [..., F] of M [..., D] at masked audio positions."""
        x, projection = self.heads.transform("frame", x), self.embedder.audio_projection.weight
        return at_least_float32(functional.linear(x, projection.T, self.heads.frame_bias))

    def region_class_logits(self, x: Tensor) -> Tensor:
        """[..., 1 + classes] of M [..., D] at masked regions; 0 is the background."""
        return at_least_float32(self.heads.classes(self.heads.transform("region_class", x)))

    def matching_logits(self, memory: Tensor) -> Tensor:
        """[B, 5] of M [B, S, D]; see `OptJaxOutput`."""
        return at_least_float32(self.heads.matching(memory[:, 0]))

    def class_logits(self, memory: Tensor, valid: Tensor, groups: Tensor) -> Tensor:
        """[B, C] of the fine-tuned classifier, linear in M at [CLS] and in its mean over each modality."""
        means = [masked_mean(memory, valid & (groups == group)) for group in (TEXT, IMAGE, AUDIO)]
        return at_least_float32(self.classifier(torch.cat([memory[:, 0], *means], -1)))

    # --- decoders ------------------------------------------------------------------------------------------

    def decoder_of(self, what: str) -> tuple[Decoder, Tensor]:
        """The 'text' or 'image' decoder, and the table of embeddings that its output is tied to."""
        decoder = {"text": self.text_decoder, "image": self.image_decoder}[what]
        if decoder is None:
            raise ValueError(f"this model was exported without its {what} decoder (--only=encoder)")
        return decoder, self.embedder.words.weight if what == "text" else decoder.symbols.weight

    def text_logits(self, symbols: Tensor, memory: Tensor, valid: Tensor) -> Tensor:
        """[B, N, W] of the text `symbols` [B, N] (words and [SEP], without [CLS]), each from those before it
        and M [B, S, D]."""
        decoder, table = self.decoder_of("text")
        return decoder(symbols, decoder.memory(memory), valid, table)

    def image_logits(self, codes: Tensor, memory: Tensor, valid: Tensor) -> Tensor:
        """[B, G, codes] of the picture's `codes` [B, G], each from those before it and M [B, S, D]."""
        decoder, table = self.decoder_of("image")
        return decoder(codes, decoder.memory(memory), valid, table)

    @torch.no_grad()
    def generate(self, **inputs) -> Tensor:
        """Ids [B, max_length] of the text for inputs of `forward`, and options of `generate_text`."""
        options = {name: inputs.pop(name) for name in GENERATION if name in inputs}
        return self.generate_text(self(**inputs), **options)[0]

    @torch.no_grad()
    def generate_text(
        self,
        encoded: OptJaxOutput,
        max_length: int | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        do_sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A text for what `forward` made of the inputs: the most likely one found, or one drawn.

        Args:
          max_length: word pieces at most, with [SEP]; by default all that the model has positions for.
          num_beams, length_penalty: see `search`. do_sample: draws, with the last four as of `sample`.
        Returns: ids [B, max_length] without [CLS], padded behind [SEP]; log-probability [B].
        Raises: ValueError: a number makes no sense, is beyond the model, or has no effect beside the others.
        """
        most = self.config.max_text_positions
        max_length, num_beams = counted("max_length", max_length, most), counted("num_beams", num_beams, 1)
        if max_length > most:
            raise ValueError(f"max_length is {max_length}; the model has positions for {most}")
        drawing = dict(zip(SAMPLING, (temperature, top_k, top_p, generator), strict=True))
        sampling = {name: value for name, value in drawing.items() if value is not None}
        if sampling and not do_sample:
            raise ValueError(f"{', '.join(sampling)}: of no effect without do_sample=True")
        if do_sample and num_beams > 1:
            raise ValueError("num_beams: of no effect with do_sample=True; leave one of the two out")
        if num_beams == 1 and length_penalty != 1:
            raise ValueError("length_penalty: of no effect without several num_beams")
        end_id, pad_id = self.config.sep_token_id, self.config.pad_token_id
        if do_sample:
            options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "end_id": end_id} | sampling
            ids, log_prob = sample(self.stepper("text", encoded, 1), max_length, **options)
            return padded_after(ids, end_id, pad_id), log_prob
        options = {"num_beams": num_beams, "length_penalty": length_penalty, "max_length": max_length}
        step, batch = self.stepper("text", encoded, num_beams), len(encoded.last_hidden_state)
        return search(step, batch, end_id=end_id, pad_id=pad_id, **options)

    @torch.no_grad()
    def generate_image_codes(
        self,
        encoded: OptJaxOutput,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        noise: Callable | None = None,
        guidance: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Draws the codes [B, G] of a picture, in raster order, and gives their log-probability [B].

        Arguments as of `sample`; top_k=1 takes the most likely code at each cell. guidance is of use to a
        model that was fine-tuned with a part of its rows shown nothing.
        """
        if generator is not None and noise is not None:
            raise ValueError("generator: of no effect beside noise; leave one of the two out")
        drawing = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        drawing |= {"generator": generator, "noise": noise, "guidance": guidance}
        encoded = self.with_nothing(encoded) if guidance else encoded
        return sample(self.stepper("image", encoded, 1), self.config.codes_per_image, **drawing)

    def with_nothing(self, encoded: OptJaxOutput) -> OptJaxOutput:
        """M [2 B, S, D] and its mask: those of `encoded`, then as many rows of a [CLS] that stands alone."""
        memory, valid = encoded.last_hidden_state, encoded.attention_mask
        ids = torch.full((1, 1), self.config.cls_token_id, device=memory.device)
        nothing = torch.zeros_like(memory)
        nothing[:, :1] = self(input_ids=ids).last_hidden_state
        alone = torch.zeros_like(valid)
        alone[:, 0] = True
        both = torch.cat([memory, nothing]), torch.cat([valid, alone])
        return OptJaxOutput(last_hidden_state=both[0], attention_mask=both[1])

    def stepper(self, what: str, encoded: OptJaxOutput, num_beams: int):
        """The `step` of a decoder, as generation wants it, for `num_beams` rows to each of `encoded`."""
        decoder, table = self.decoder_of(what)
        memory = decoder.memory(encoded.last_hidden_state)
        memory = [tuple(part.repeat_interleave(num_beams, 0) for part in layer) for layer in memory]
        valid = encoded.attention_mask.repeat_interleave(num_beams, 0)
        return lambda symbol, past: decoder.step(symbol, past, memory, valid, table)


def seen(mask: Tensor | None, positions: Tensor) -> Tensor:
    """bool [B, N] of a mask for positions [B, N, ...]; all of them without one."""
    if mask is None:
        return torch.ones(positions.shape[:2], dtype=torch.bool, device=positions.device)
    return mask != 0
