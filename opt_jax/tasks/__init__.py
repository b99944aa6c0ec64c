"""Downstream tasks: what each trains, from a pre-trained model, and how it is measured.

`opt_jax.finetuning` runs them, one class of `opt_jax.tasks.downstream.Downstream` each.
"""
