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

An id of the Hugging Face hub (`org/name@revision`) is another way to the same repositories: whole files, in its own cache.

    hub_id      what is an id, and where the hub's cache has it
    hub_calls   calls to the hub: repeated, and their faults told
    hub_files   which files of a repository are read
    hub         a commit's listing, models and downloads
    hub_bundle  bundles: fetched, and compared with their manifest
    hub_push    bundles: uploaded
"""

from eigenzoo.formats.remote.address import is_url
from eigenzoo.formats.remote.record import remote_file, remote_url, source_url

__all__ = ["is_url", "remote_file", "remote_url", "source_url"]
