"""The configuration of an exported OPT: what config.json holds."""

from transformers import PretrainedConfig

IGNORED = -100  # label of a position without loss


class OptJaxConfig(PretrainedConfig):
    """Sizes of the network, and ids of the special tokens.

    Args:
      vocab_size: word pieces. region_size, audio_size: numbers of one region's, one audio position's feature.
      num_region_classes: of the detector, without the background. num_codes: entries of the pictures'
        codebook. codes_per_image: of one picture. num_classes, or num_labels: of the fine-tuned classifier, 0
        for none.
      num_layers, num_heads, mlp_size: of the cross-modal encoder.
      text_decoder, image_decoder: {"num_layers", "num_heads", "mlp_size"}; None where it was left out.
      pre_norm: norms before each block; False is BERT's order.
      num_alignment_layers: the first layers of the encoder, in which a position sees its own modality only.
      alignment_size: numbers of an embedding. temperature_min: lowest temperature of their contrast.
      frame_window: audio positions that the convolution over the frames sees, 0 for no convolution.
      max_text_positions, max_audio_positions: longest inputs.
      dropout: in training. initializer_range: deviation of fresh weights.
    """

    model_type = "opt_jax"
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "mlp_size",
        "num_labels": "num_classes",
    }

    def __init__(
        self,
        vocab_size=30522,
        region_size=2048,
        audio_size=3072,
        num_region_classes=1600,
        num_codes=8192,
        codes_per_image=64,
        num_classes=0,
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        mlp_size=3072,
        text_decoder=None,
        image_decoder=None,
        pre_norm=True,
        layer_norm_epsilon=1e-12,
        num_alignment_layers=4,
        alignment_size=256,
        temperature_min=0.01,
        frame_window=5,
        max_text_positions=512,
        max_audio_positions=384,
        dropout=0.1,
        initializer_range=0.02,
        pad_token_id=0,
        cls_token_id=101,
        sep_token_id=102,
        mask_token_id=103,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.region_size = region_size
        self.audio_size = audio_size
        self.num_region_classes = num_region_classes
        self.num_codes = num_codes
        self.codes_per_image = codes_per_image
        self.num_classes = num_classes
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.mlp_size = mlp_size
        self.text_decoder = text_decoder
        self.image_decoder = image_decoder
        self.pre_norm = pre_norm
        self.layer_norm_epsilon = layer_norm_epsilon
        self.num_alignment_layers = num_alignment_layers
        self.alignment_size = alignment_size
        self.temperature_min = temperature_min
        self.frame_window = frame_window
        self.max_text_positions = max_text_positions
        self.max_audio_positions = max_audio_positions
        self.dropout = dropout
        self.initializer_range = initializer_range
        self.cls_token_id = cls_token_id
        self.sep_token_id = sep_token_id
        self.mask_token_id = mask_token_id
        super().__init__(**kwargs)
        self.pad_token_id = pad_token_id
