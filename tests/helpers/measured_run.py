"""The training command, which at its end tells what this rank's weights, gradients and optimizer really hold.

Forked as a job of several processes; the flags are those of tools/pretrain_mixmoe.py.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.helpers.fake_cluster import measured_memory


def main() -> None:
    """Train, measure, print a line of JSON."""
    from megatron.training import training

    from mixmoe_megatron.training.pretrain import main as train

    setup, built = training.setup_model_and_optimizer, []

    def remember(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        built.extend(result[:2])
        return result

    training.setup_model_and_optimizer = remember
    train()
    sys.stdout.write("\nMEMORY " + json.dumps(measured_memory(*built)) + "\n")


if __name__ == "__main__":
    main()
