"""fairseq2 is set up once in a process."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def fairseq2_is_set_up() -> None:
    """Let fairseq2 load its extensions, and stop at one that fails."""
    import fairseq2

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAIRSEQ2_EXTENSION_TRACE", "1")
        fairseq2.init_fairseq2()
