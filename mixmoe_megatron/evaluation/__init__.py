"""Evaluation of exported models: translation scores, perplexity, routing statistics and the report.

The package knows nothing of Megatron: it loads Hugging Face checkpoints, so any causal language model can be compared.
"""
