"""The flags that Mix-MoE adds to Megatron's own are few, and a new one is a decision: it changes this list."""

from __future__ import annotations

import argparse

from mixmoe_megatron.training.arguments import add_mixmoe_args

LIMIT = 15
PINNED = {"--phase", "--mixmoe-stage", "--init-from", "--experts-backend", "--loss-on", "--pack", "--dry-run"}
PINNED |= {"--hf-load", "--hf-save", "--upcycle-options", "--eval-mono", "--eval-mono-interval"}
PINNED |= {"--lpr-coeff", "--lpr-impl", "--lpr-original-data-path"}


def test_training_adds_the_pinned_flags_only() -> None:
    empty = argparse.ArgumentParser(add_help=False)
    added = {flag for action in add_mixmoe_args(empty)._actions for flag in action.option_strings}
    assert added == PINNED
    assert len(PINNED) <= LIMIT
