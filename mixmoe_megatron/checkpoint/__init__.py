"""Bytes and formats: torch archives, torch_dist checkpoints, safetensors, their health and what a checkpoint is."""
