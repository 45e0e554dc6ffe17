"""The old name of `mixmoe_megatron.integrations.megatron_bridge`."""

from mixmoe_megatron.renamed import attributes_of

__getattr__ = attributes_of("mixmoe_megatron.integrations.megatron_bridge", __name__)
