"""Speed of the pre-training step: this project's beside the same network in eager PyTorch, in one run.

    python -m opt_jax.benchmark

takes a few minutes of a quiet machine and prints one table. `torch_opt` and `torch_step` are the PyTorch side
and the only files that need torch (the extra `torch`); tests/parity shows that both sides compute the same.
"""
