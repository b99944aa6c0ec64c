"""The model in PyTorch, as an exported folder has it: these files are copied there, next to the weights.

They import torch, transformers and what comes with it (numpy, safetensors), Pillow where there are pictures,
and each other by relative imports, so that they run here and there. A sound file is read by soundfile.
"""

MODELING_FILES = (
    "configuration_opt_jax.py",
    "decoder_opt_jax.py",
    "encoder_opt_jax.py",
    "generation_opt_jax.py",
    "layers_opt_jax.py",
    "losses_opt_jax.py",
    "modeling_opt_jax.py",
)
PROCESSING_FILES = (
    "boxes_opt_jax.py",
    "detector_opt_jax.py",
    "dvae_opt_jax.py",
    "images_opt_jax.py",
    "pooling_opt_jax.py",
    "processing_opt_jax.py",
    "random_opt_jax.py",
    "resnet_opt_jax.py",
    "sound_opt_jax.py",
)
