"""The frozen encoders as Flax modules, and their storage."""
