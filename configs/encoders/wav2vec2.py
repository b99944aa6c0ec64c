"""wav2vec 2.0 (arXiv 2006.11477), the speech encoder, and its training.

`tiny` is trained from nothing on Spoken Scenes as a stage of `configs/pretrain.py`, 0.42 s a CTC step on two
cores. With 400 CTC steps it reached a contrast accuracy of 33 % (chance 6 %), a code perplexity of 22 % and
5.0 % word errors on unseen voices. `base` and `large` are the shapes of the published models
(95 M and 317 M parameters), with the paper's objectives and fine-tuning.
"""

from ml_collections import ConfigDict

from opt_jax.configuration import choose

LETTERS = ("<pad>", "|", "'", *"abcdefghijklmnopqrstuvwxyz")  # index 0 is CTC's blank, '|' is the space
# The alphabet of the published English fine-tunings, in their order.
PUBLISHED_LETTERS = ("<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ")


def get_config(variant: str = "tiny") -> ConfigDict:
    """`variant`: 'tiny', 'base' or 'large' -> ConfigDict(model, batches, ssl, ctc)."""
    config = ConfigDict(dict(model=_base_model(), batches=_batches(), ssl=_ssl(), ctc=_ctc()))
    choose(variant, dict(tiny=_make_tiny, base=lambda config: None, large=_make_large))(config)
    return config


def _base_model():
    return dict(
        conv_dim=(512,) * 7,
        conv_kernel=(10, 3, 3, 3, 3, 2, 2),
        conv_stride=(5, 2, 2, 2, 2, 2, 2),  # 320 samples, 20 ms, a frame
        conv_bias=False,
        feature_norm="group",  # 'group': the first convolution, over time; 'layer': all, over channels
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        intermediate_size=3072,
        position_kernel=128,
        position_groups=16,
        stable_layer_norm=False,  # True: norm before each block, not after
        layer_norm_eps=1e-5,
        initializer_range=0.02,
        projection_dropout=0.0,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        activation_dropout=0.0,
        final_dropout=0.0,  # before the CTC head
        layerdrop=0.05,
        unroll=1,
        vocabulary=PUBLISHED_LETTERS,
        normalize_waveforms=True,  # to mean 0 and deviation 1 over each clip, as nearly all published models
        features="context",  # what is extracted: 'context', 'conv' or a hidden state's index, as "6"
    )


def _batches():
    return dict(
        bucket_seconds=(4.0, 8.0, 12.0, 16.0),
        pool_batches=16,
        letters_per_second=25.0,
        speeds=(1.0,),  # at which the clips are played in training
        evaluation_batch_size=16,
    )


def _ssl():
    return dict(
        enabled=True,
        mask_probability=0.65,  # 0.065 of the frames begin a span
        mask_length=10,
        num_negatives=100,
        contrast_temperature=0.1,
        num_codebooks=2,
        codebook_size=320,
        codevector_dim=256,
        projection_dim=256,
        temperature_start=2.0,
        temperature_decay=0.999995,  # a step
        temperature_end=0.5,
        feature_dropout=0.1,
        diversity_weight=0.1,
        feature_penalty_weight=10.0,
        train=dict(
            steps=400_000,
            batch_size=256,
            learning_rate=5e-4,
            warmup_steps=32_000,
            decay="linear",
            beta1=0.9,
            beta2=0.98,
            epsilon=1e-6,
            weight_decay=0.01,
            clip_norm=1.0,
            log_every=200,
            checkpoint_every=5000,
        ),
    )


def _ctc():
    return dict(
        enabled=True,
        compare_scratch=False,
        freeze_feature_encoder=True,
        mask_probability=0.5,
        mask_length=10,
        train=dict(
            steps=80_000,
            batch_size=128,
            learning_rate=5e-5,
            warmup_steps=8000,
            decay="linear",
            end_learning_rate_fraction=0.05,
            beta1=0.9,
            beta2=0.98,
            epsilon=1e-8,
            weight_decay=0.0,
            clip_norm=1.0,
            log_every=200,
            checkpoint_every=5000,
        ),
    )


def _make_large(config):
    config.model.update(
        dict(
            conv_bias=True,
            feature_norm="layer",
            stable_layer_norm=True,
            hidden_size=1024,
            num_layers=24,
            num_heads=16,
            intermediate_size=4096,
            layerdrop=0.1,
        )
    )
    config.ssl.update(dict(codevector_dim=768, projection_dim=768, temperature_end=0.1))


def _make_tiny(config):
    config.model.update(
        dict(
            conv_dim=(32, 32, 64, 64, 64, 64, 64),
            hidden_size=128,
            num_layers=3,
            num_heads=4,
            intermediate_size=512,
            position_kernel=32,
            position_groups=4,
            stable_layer_norm=True,
            initializer_range=0.08,  # about width ** -0.5
            hidden_dropout=0.0,
            attention_dropout=0.0,
            layerdrop=0.0,
            vocabulary=LETTERS,
        )
    )
    config.batches.update(
        dict(bucket_seconds=(3.1, 5.0), pool_batches=8, letters_per_second=35.0, evaluation_batch_size=50)
    )
    config.ssl.update(
        dict(
            num_negatives=20,
            codebook_size=20,
            codevector_dim=64,
            projection_dim=64,
            temperature_decay=0.99,
            feature_dropout=0.0,
            mask_length=5,  # fast speech, up to 30 letters a second: 0.2 s would be six letters
            # With the paper's 0.1 and 10 these two win long before the contrast begins to learn: the codes
            # become uniform noise, or the features vanish.
            diversity_weight=0.005,
            feature_penalty_weight=0.0,
        )
    )
    config.ssl.train.update(
        dict(
            steps=150,
            batch_size=16,
            learning_rate=1e-3,
            warmup_steps=20,
            weight_decay=0.0,
            log_every=25,
            checkpoint_every=1000,
        )
    )
    config.ctc.update(dict(freeze_feature_encoder=False, mask_probability=0.0))
    config.ctc.train.update(
        dict(
            steps=400,
            batch_size=16,
            learning_rate=1e-3,
            warmup_steps=20,
            end_learning_rate_fraction=0.02,
            log_every=25,
            checkpoint_every=1000,
        )
    )
