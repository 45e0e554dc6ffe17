"""The training entry: stock `megatron.training.pretrain` with Mix-MoE arguments, model, data and start-up hooks."""
