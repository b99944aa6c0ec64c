"""OPT, the Omni-Perception Pre-Trainer (arXiv 2107.00249), in JAX: one model for text, image and speech.

Importing the package imports nothing else; in particular neither TensorFlow nor PyTorch.
"""

__version__ = "0.1.0"
