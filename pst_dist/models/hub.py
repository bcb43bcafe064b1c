"""Goes offline when the Hugging Face hub does not answer.

The hub's client would try again for about twenty seconds for each file, also for files that are in the cache. Compute
nodes of a cluster often have no network, so one short request decides for the whole process.
"""

from __future__ import annotations

import functools
import logging
import os
import ssl
import sys
import urllib.error
import urllib.request

log = logging.getLogger(__name__)
HUB_SECONDS = 10.0
"""How long to wait for an answer of the hub."""


def use_cache_without_hub() -> None:
    """From the first call on that gets no answer of the hub, let its libraries use only their caches.

    Call it before a library may ask the hub. Does nothing when HF_HUB_OFFLINE is set already.
    """
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        unreachable()


@functools.lru_cache(maxsize=1)
def unreachable() -> str:
    """Why the hub did not answer this process, which is offline from then on; empty if it answered."""
    from huggingface_hub import constants

    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            return ""
    except urllib.error.HTTPError:
        return ""  # any status is an answer
    except (OSError, ValueError) as error:
        cause = getattr(error, "reason", error)
    if isinstance(cause, ssl.SSLError):  # it answered; the hub's client may have certificates that urllib lacks
        return ""
    reason = str(cause)
    log.warning("%s does not answer (%s): using only what is in the cache", constants.ENDPOINT, reason)
    os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that this one starts
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:  # it copies the value when it is imported
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    return reason


def went_offline() -> str:
    """Why `unreachable` made this process offline; empty if it has not been asked, or the hub answered."""
    return unreachable() if unreachable.cache_info().currsize else ""
