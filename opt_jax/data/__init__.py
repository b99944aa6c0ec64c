"""Sources of raw (image, caption, speech) triplets, the batch plan, the loader. Knows nothing of models."""
