"""Whether the Hugging Face hub answers, asked once and briefly.

Its own client asks six times with growing pauses: without a network that is 23 s for one missing file (measured), and a
tokenizer looks for two.
"""

from __future__ import annotations

import functools

_TIMEOUT_SECONDS = 5.0


@functools.cache
def reachable() -> bool:
    """One request to the configured endpoint, proxies and `HF_HUB_OFFLINE` honoured."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_SECONDS)
    except Exception:  # the HTTP library differs with the client's version; any failure means the same
        return False
    return True
