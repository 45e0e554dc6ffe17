"""Mix-MoE (arXiv 2605.24681) for Megatron-Core: a dense decoder upcycled into LM and MT expert groups."""
