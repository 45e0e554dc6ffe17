"""Mix-MoE in fairseq2 0.8: a model family, its tokenizers and datasets, a recipe for both stages, and translation.

Optional: nothing else in this package imports it, and it needs `fairseq2`, which finds `extension.py` by the entry
point in pyproject.toml. Everything else hangs there.
"""
