"""What a file is, without reading it: two looks at it that say the same have seen the same contents."""

from __future__ import annotations

import os
from pathlib import Path

from eigenzoo.errors import FormatError
from eigenzoo.formats.remote import remote_file


def identify_file(path: Path) -> list[object]:
    """Return plain values that no two contents share.

    A file is known by its number on the disk, its size, and the times at which its content and its entry last changed, the latter
    of which nobody can set; a file elsewhere by its address and the tag that its store gives to its content.

    Raises FormatError for a file that is gone.
    """
    elsewhere = remote_file(path)
    if elsewhere is not None:
        return [elsewhere.url, elsewhere.size, elsewhere.tag]
    try:
        status = os.stat(path)
    except OSError as error:
        raise FormatError(f"cannot be read any more ({error.strerror})", where=str(path)) from error
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
