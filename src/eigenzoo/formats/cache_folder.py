"""Where files lie that can be made again: mirrors of remote models, and whatever else is kept to save time."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

from platformdirs import user_cache_dir

VARIABLE = "EIGENZOO_CACHE"
OFF = "off"


def cache_folder() -> Path:
    """Return the cache folder, which need not exist yet: `$EIGENZOO_CACHE`, else the user's own cache.

    Where the variable says `off`, it is a temporary folder that vanishes with the process.
    """
    chosen = os.environ.get(VARIABLE, "")
    if chosen == OFF:
        return _temporary(os.getpid())
    return Path(chosen).expanduser().absolute() if chosen else Path(user_cache_dir("eigenzoo"))


@cache
def _temporary(process: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="eigenzoo-"))

    def remove() -> None:
        # A forked child leaves by its parent's list of exits too, and must leave the parent's folder alone.
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder
