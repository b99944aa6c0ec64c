"""OPT's pre-training (arXiv 2107.00249), from raw triplets to a report.

    python -m opt_jax.main --config=configs/pretrain.py

makes Spoken Scenes (pictures, sentences, speech), trains the frozen encoders on them, caches their features,
pre-trains the model, evaluates it and writes runs/tiny/report.html. The variant `tiny` takes about half an
hour on two CPU cores.

    python -m opt_jax.main --config=configs/pretrain.py:base_paper --config.train.batch_size=120

chooses another variant and overrides a field:

    tiny        4 layers, 192 wide; two cores
    small       the same model on three times the data, with more steps; two cores, an hour and a quarter
    manifest    the same model on data of your own: --config.data.manifest=SOURCE (opt_jax/data/sources.py)
    base_paper  the paper's model and schedule, as far as the paper tells them
    base        the same size with this project's changes: norms first, alignment layers, contrast,
                neighbouring frames
    large       24 layers, 1024 wide, as the released port's large model

The comments name the source: [paper], [port] (the authors' released code), else this project's choice.
"""

from pathlib import Path

from ml_collections import ConfigDict

from opt_jax.configuration import choose, load

ENCODERS = Path(__file__).parent / "encoders"

# What differs by variant; the rest is below. In decoders and encoder alike, mlp_size is 4 x hidden_size.
TINY = dict(
    model=dict(hidden_size=192, num_layers=4, num_heads=6, num_alignment_layers=2, alignment_size=128),
    decoder=dict(num_layers=2, num_heads=6),
    text_positions=20,
    audio_positions=64,
    regions=8,
    buckets=dict(text_lengths=(20, 20), audio_lengths=(36, 64)),
    placeholder_lengths=dict(text=12, image=6, audio=32),
    train=dict(steps=1700, batch_size=32, learning_rate=1.5e-3, warmup_steps=150, decay="cosine"),
)
VARIANTS = {
    "tiny": TINY,
    "small": TINY | dict(train=TINY["train"] | dict(steps=8000, warmup_steps=300)),
    "manifest": TINY
    | dict(
        text_positions=32,
        regions=64,
        buckets=dict(text_lengths=(8, 32), audio_lengths=(32, 64)),
        placeholder_lengths=dict(text=6, image=24, audio=20),
        train=TINY["train"] | dict(steps=1200),
    ),
    "base_paper": dict(
        # 12 layers, 768 wide, 12 heads, norms after each block [paper]; decoders of 6 layers, 8 heads [port].
        model=dict(hidden_size=768, num_layers=12, num_heads=12, num_alignment_layers=0, pre_norm=False),
        decoder=dict(num_layers=6, num_heads=8),
        text_positions=128,
        audio_positions=384,
        # Bottom-up attention's fixed number; UNITER keeps 10 to 100, and the batches are padded to 30 [port].
        regions=36,
        buckets=dict(text_lengths=(32, 64, 128), audio_lengths=(96, 192, 384)),
        placeholder_lengths=dict(text=24, image=36, audio=96),
        # 100,000 steps on 4 devices of 10,240 tokens each (about 60 triplets), 5e-5, warmup, decay [paper].
        train=dict(steps=100_000, batch_size=240, learning_rate=5e-5, warmup_steps=10_000, decay="linear"),
    ),
    "base": dict(
        model=dict(hidden_size=768, num_layers=12, num_heads=12, num_alignment_layers=4, alignment_size=256),
        decoder=dict(num_layers=6, num_heads=8),
        text_positions=128,
        audio_positions=384,
        # Bottom-up attention's fixed number; UNITER keeps 10 to 100, and the batches are padded to 30 [port].
        regions=36,
        buckets=dict(text_lengths=(32, 64, 128), audio_lengths=(96, 192, 384)),
        placeholder_lengths=dict(text=24, image=36, audio=96),
        train=dict(steps=100_000, batch_size=256, learning_rate=2e-4, warmup_steps=5000, decay="cosine"),
    ),
    "large": dict(
        # 24 layers; decoders with 16 heads, 1024 wide [port].
        model=dict(hidden_size=1024, num_layers=24, num_heads=16, num_alignment_layers=8, alignment_size=256),
        decoder=dict(num_layers=6, num_heads=16),
        text_positions=128,
        audio_positions=384,
        regions=100,
        buckets=dict(text_lengths=(32, 64, 128), audio_lengths=(96, 192, 384)),
        placeholder_lengths=dict(text=24, image=64, audio=96),
        train=dict(steps=100_000, batch_size=512, learning_rate=1e-4, warmup_steps=10_000, decay="cosine"),
    ),
}


def get_config(variant: str = "tiny") -> ConfigDict:
    """The configuration of a variant; all variants have the same fields."""
    v = choose(variant, VARIANTS)
    own, embedded = variant == "manifest", variant in ("tiny", "small")
    paper, little = variant == "base_paper", own or embedded
    config = ConfigDict()
    config.variant = variant
    config.workdir = f"runs/{variant}"
    config.seed = 0
    config.precision = "float32"  # or 'bfloat16' (TPU, recent GPUs), 'float16' (with loss scaling)
    # Several processes: SLURM is recognised; 'auto' asks the cluster that JAX recognises (a TPU pod); or
    # host:port, with the number of processes and the place of this one.
    config.distributed = ConfigDict(dict(coordinator="", num_processes=0, process_id=-1))

    # --- data -------------------------------------------------------------------------------------
    config.data = ConfigDict()
    config.data.source = "manifest" if own else "spoken_scenes"
    # Of each training row, with pictures moved a little and speech at other speeds: few rows are soon known
    # by heart (opt_jax/data/augmentation.py).
    config.data.copies = 3 if own else 0
    config.data.manifest = ""  # where source is 'manifest': see opt_jax/data/sources.py
    config.data.spoken_scenes = ConfigDict(
        dict(train=24_000 if variant == "small" else 8000, validation=300, test=500)
        | dict(image_size=128, max_objects=5, shard_size=500)
    )

    # --- frozen encoders --------------------------------------------------------------------------
    # They go with the data, not with the size of the model: Spoken Scenes needs no more than these. A
    # directory in `pretrained` (model.safetensors, model.sha256, config.json) replaces the training.
    config.encoders = ConfigDict()
    # 'detector'; 'grid': cells of the dVAE's last map; 'ready': every picture comes with its regions.
    config.encoders.regions = "grid" if own else "detector"
    config.encoders.grid = ConfigDict(dict(window=3))  # a region is so many cells wide and high
    config.encoders.ready = ConfigDict(dict(size=2048, classes=1600))
    config.encoders.tokenizer = ConfigDict(dict(kind="train", vocab_size=400, name="bert-base-uncased"))
    for name in ("detector", "wav2vec2", "dvae"):
        config.encoders[name] = load(ENCODERS / f"{name}.py", "tiny")
        config.encoders[name].pretrained = ""
    if own:  # people, not a synthesizer, and perhaps few of them: see README, "Your own data"
        # A shorter warm-up may end on CTC's plateau of blanks and stay there.
        config.encoders.wav2vec2.ctc.train.update(dict(steps=1000, warmup_steps=150))
        config.encoders.wav2vec2.batches.speeds = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15)
        config.encoders.wav2vec2.batches.bucket_seconds = (1.5, 2.1, 3.1, 5.0)
    # Costs minutes that `tiny` has not: what CTC reaches without the self-supervised half, for comparison.
    config.encoders.wav2vec2.ctc.compare_scratch = variant == "small"

    # --- feature cache ----------------------------------------------------------------------------
    config.cache = ConfigDict()
    config.cache.dtype = "float16"
    config.cache.examples_per_shard = 500
    config.cache.processes = 1  # that extract; each loads the encoders, so one is best on one accelerator
    config.cache.audio_stack = 4  # wav2vec 2.0's 50 frames a second make 12.5 positions
    config.cache.max_audio_positions = v["audio_positions"]  # longer speech is cut, and counted
    config.cache.max_regions = v["regions"]
    config.loader = ConfigDict(v["buckets"] | dict(workers=0))

    # --- model ------------------------------------------------------------------------------------
    width = v["model"]["hidden_size"]
    decoder = v["decoder"] | dict(mlp_size=4 * width)
    config.model = ConfigDict(
        dict(
            hidden_size=width,
            num_layers=v["model"]["num_layers"],
            num_heads=v["model"]["num_heads"],
            mlp_size=4 * width,  # [paper]
            dropout=0.0 if embedded else 0.1,  # 0.1 [paper]; a few epochs do not overfit yet
            pre_norm=v["model"].get("pre_norm", True),  # False is BERT's order [paper], for BERT's weights
            layer_norm_epsilon=1e-12,  # BERT's
            initializer_range=0.02 if width >= 768 else 0.05,  # 0.02: BERT's
            # The first layers attend within each modality only, and contrast compares what they pool.
            num_alignment_layers=v["model"]["num_alignment_layers"],
            alignment_size=v["model"].get("alignment_size", 256),
            temperature_init=0.07,
            temperature_min=0.01,
            max_text_positions=512 if width >= 768 else v["text_positions"],  # 512: BERT's
            max_audio_positions=v["audio_positions"],
            # Audio positions in the convolution that tells each of its neighbours; 0: none [paper].
            frame_window=0 if paper else 5,
            text_decoder=dict(decoder),
            image_decoder=dict(decoder),
            remat=width >= 1024,  # compute activations twice to store less
            unroll=1 if width >= 768 else 4,  # layers in one turn of the loop over layers
        )
    )
    config.model.dtype = config.get_ref("precision")

    # What `python -m opt_jax.convert import` made of BERT or UNITER; parameters that it has not start fresh.
    config.initial_parameters = ""

    # --- objectives -------------------------------------------------------------------------------
    config.objectives = ConfigDict()
    config.objectives.weights = ConfigDict(  # 0: not computed
        dict(mlm=1.0, mvfr=1.0, mrc=1.0, mafr=1.0, macl=1.0, dtr=1.0, dir=1.0, matching=1.0)
        | dict(contrastive=0.0 if paper else 1.0)  # this project's addition
        # Of a batch of 32 some 2 rows have masked words, 2 masked regions, 2 masked frames. At weight 1 the
        # gradients of these three (norms 10, 9, 15, mostly noise) drown all others (1 to 3).
        | (dict(mlm=0.2, mrc=0.1, macl=0.05) if little else {})
        # Cells of a grid have no classes, and what is masked is also in the windows of its neighbours.
        | (dict(mrc=0.0, mvfr=0.2) if own else {})
    )
    # Of every 3 or 4 rows so many are corrupted at token, modality and sample level.
    config.objectives.rows = ConfigDict(
        dict(token=1, modality=1, sample=1)
        if paper
        else dict(token=1, modality=6 if own else 2, sample=1)  # of few samples writing is learned slowest
    )
    config.objectives.mask_probability = 0.15  # [paper]
    # Words before the one to be written that its decoder does not read; few captions are soon known by heart.
    config.objectives.word_drop_probability = 0.3 if own else 0.0
    # 0.3 each [paper]. Small runs drop the text more often: what is to be written is learned slowest.
    config.objectives.modality_drop_probability = ConfigDict(
        dict(text=0.7, image=0.4, audio=0.4) if little else dict(text=0.3, image=0.3, audio=0.3)
    )
    config.objectives.dropped_as_absent = 0.5  # else as a fixed number of mask tokens:
    config.objectives.placeholder_lengths = ConfigDict(v["placeholder_lengths"])
    # Deviation of noise on standardised frames; an encoder trained on the same recordings is sure of these.
    config.objectives.audio_noise = 0.5 if own else 0.0
    config.objectives.sample_drop_probability = 0.5  # a matching row loses a modality: pairs are learned too
    config.objectives.macl_temperature = 0.1  # [port]; with the paper's 1 the loss cannot fall below 2.2
    config.objectives.label_smoothing = 0.0 if little else 0.1  # 0.1 [port]
    # Share of the replacements in matching that are drawn by similarity.
    config.objectives.hard_negative_fraction = 0.0 if paper else 0.2 if little else 0.5
    config.objectives.hard_negative_temperature = 0.1

    # --- training ---------------------------------------------------------------------------------
    config.train = ConfigDict(
        dict(
            steps=v["train"]["steps"],
            batch_size=v["train"]["batch_size"],  # triplets, over all devices
            accumulation=1,  # microbatches of a step
            learning_rate=v["train"]["learning_rate"],
            warmup_steps=v["train"]["warmup_steps"],
            decay=v["train"]["decay"],
            end_learning_rate_fraction=0.0,
            beta1=0.9,  # [paper]
            beta2=0.98,  # [paper]
            epsilon=1e-6,
            weight_decay=0.01,  # not on norms and biases [port]
            clip_norm=1.0,  # [port]
            log_every=50,
            checkpoint_every=1000,
            checkpoint_minutes=10.0,
            keep=2,
            validate_every=1000 if paper else 0,
            early_stopping_patience=10 if paper else 0,  # validations without progress [paper]
            max_nonfinite=10,
            mesh=dict(data=-1, fsdp=1, tensor=1),  # -1: all remaining devices
        )
    )
    config.train.precision = config.get_ref("precision")

    # --- evaluation -------------------------------------------------------------------------------
    config.evaluation = ConfigDict(
        dict(
            batch_size=100,
            pool_size=100,  # of retrieval; the paper's is 5,000
            pools=5,
            matching_pools=1,  # matching scores every pair, so fewer pools
            validation_pools=3,  # on which the scorers' weights are chosen
            rerank_top=10,  # of the linear-cost scorers' best, put in order by matching too; 0: none
            texts=500,  # transcripts and captions written
            beams=3,
            max_new_tokens=v["text_positions"],
            probe_train=1500,
            pictures=100,
            top_k=32,  # codes of a picture are drawn among so many
            examples=6,  # of each kind in the report
            seed=0,
        )
    )

    # Minutes of each stage on a quiet machine with two cores, and seconds of a pre-training step; 0: not
    # measured.
    minutes = dict(data=0.7, tokenizer=0.1, detector=2.3, wav2vec2=4.5, dvae=2.3, cache=2.3)
    if own:
        minutes = dict.fromkeys(minutes, 0.0)  # they depend on the data
    if variant == "small":
        minutes |= dict(data=1.8, wav2vec2=7.3, cache=5.5)
    minutes["evaluation"] = 4.3 if embedded else 0.0
    config.predicted_minutes = ConfigDict(minutes)
    config.predicted_step_seconds = 0.43 if embedded else 0.0
    return config
