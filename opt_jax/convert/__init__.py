"""Published weights in, and later PyTorch out: tables of (pattern, path, transform)."""
