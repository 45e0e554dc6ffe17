"""Between Hugging Face directories and Megatron torch_dist checkpoints, with every key accounted for."""
