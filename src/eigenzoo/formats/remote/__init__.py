"""Models in object stores and hubs, read through fsspec by ranges.

Everything else works on local paths, so a remote model is *mirrored*: its small files are downloaded, and each weights
file becomes a local stub of the same size that holds the header and is a hole behind it. What is checked of a header is
then checked by the same code. Values are never read from a stub: a record beside it says where they lie.

    listing   one request for all names, sizes and tags below a URL
    mirror    configs and headers of many models at once, into the cache folder
    record    which local files are stubs, and of what
    fetching  many ranges at once: bounded, retried, resumed
    source    how one range is read from each kind of store, and how a change of the file is noticed
    address   URLs, their drivers, and what of them may be shown
"""

from eigenzoo.formats.remote.address import is_url
from eigenzoo.formats.remote.record import remote_file, remote_url

__all__ = ["is_url", "remote_file", "remote_url"]
