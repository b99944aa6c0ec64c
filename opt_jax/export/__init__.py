"""The model in PyTorch, as an exported folder has it: these files are copied there, next to the weights.

They import torch and transformers only, and each other by relative imports, so that they run here and there.
"""

MODELING_FILES = (
    "configuration_opt_jax.py",
    "decoder_opt_jax.py",
    "encoder_opt_jax.py",
    "generation_opt_jax.py",
    "layers_opt_jax.py",
    "modeling_opt_jax.py",
)
