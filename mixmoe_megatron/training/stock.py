"""The old name of `mixmoe_megatron.integrations.stock_megatron`."""

from mixmoe_megatron.renamed import attributes_of

__getattr__ = attributes_of("mixmoe_megatron.integrations.stock_megatron", __name__)
