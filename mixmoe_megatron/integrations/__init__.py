"""Mix-MoE inside other programs: an unmodified Megatron-LM script, Megatron-Bridge."""
