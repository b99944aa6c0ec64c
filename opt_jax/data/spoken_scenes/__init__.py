"""Spoken Scenes: generated pictures of coloured shapes, sentences about them, and the sentences spoken."""

from opt_jax.data.spoken_scenes.generation import GENERATOR_VERSION, default_config, generate, has_all_shards
from opt_jax.data.spoken_scenes.source import SpokenScenes

__all__ = ["GENERATOR_VERSION", "SpokenScenes", "default_config", "generate", "has_all_shards"]
