"""The OPT model (arXiv 2107.00249, section 3): embedders, cross-modal encoder, decoders and heads.

Dimension letters, used in every docstring and einsum of the package:

    B batch, T text positions (position 0 is [CLS]), V image regions, A audio positions, S = T + V + A,
    D hidden width, H attention heads, K width of one head, F width of the feed-forward layer, L layers,
    G image codes of a picture, C classes, E width of the alignment space, W words of the vocabulary.
"""
