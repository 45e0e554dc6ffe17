"""Every change that is made to stock Megatron-LM."""
