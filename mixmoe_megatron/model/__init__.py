"""The mathematics on Megatron-Core: the layer, its options and sizes, and the rows that cross to Hugging Face."""
