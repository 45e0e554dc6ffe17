"""Every change that is made to stock Megatron-LM: `install.py` states them all, in order; each file is one of them."""
