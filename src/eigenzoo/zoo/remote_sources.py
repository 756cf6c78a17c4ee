"""From URLs to the models that lie there, by the same rules as folders and globs of this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from eigenzoo.errors import EigenzooError, UnsupportedError, ZooError
from eigenzoo.formats.kinds import FILE_SUFFIXES, kind_of_folder
from eigenzoo.formats.remote.address import shown_url, split_glob
from eigenzoo.formats.remote.hub_id import use_of_bundle
from eigenzoo.formats.remote.listing import Entry, Folder, entries_matching, is_bundle, list_urls
from eigenzoo.formats.remote.mirror import MODEL_DEPTH

Key = Callable[[str], list[tuple[int, int, str]]]


def find_remote(urls: Sequence[str], max_depth: int, order: Key) -> list[list[Entry]]:
    """Return the models that each of the URLs names, listed several URLs at once; raises for the first that has none.

    Args:
        urls: folders that are models or hold them, files, globs.
        max_depth: how many folders deep models are looked for.
        order: the sort key of names.
    """
    splits = [split_glob(url) for url in urls]
    for url in urls:
        if url.endswith(".txt"):
            raise UnsupportedError(
                "a list of models at a remote place",
                where=shown_url(url),
                rule="lists are read from this machine; they may hold URLs",
                next_step="download it",
            )
    depths = [(len(parts) if "**" not in parts else max_depth + len(parts)) or max_depth for _, parts in splits]
    listed = list_urls([root for root, _ in splits], [depth + MODEL_DEPTH for depth in depths])
    found = []
    for url, (_, parts), entry in zip(urls, splits, listed, strict=True):
        if isinstance(entry, EigenzooError):
            raise entry
        found.append(_models(entry, parts, max_depth, order, shown_url(url)))
    return found


def _models(entry: Entry, parts: Sequence[str], max_depth: int, order: Key, url: str) -> list[Entry]:
    if not isinstance(entry, Folder):
        return [entry]
    if parts:
        matching = {found.url: found for found in entries_matching(entry, parts)}
        return [
            found
            for _, found in sorted(matching.items(), key=lambda item: order(item[0]))
            if not last_name(found).startswith((".", "_")) and _is_model(found) and not is_bundle(found)
        ]
    if not entry.entries:
        raise ZooError("there is no such file or folder, or no model in it", where=url)
    if is_bundle(entry):
        raise ZooError(
            "this is a bundle, not a zoo or a model",
            where=url,
            rule="bundles are not read from URLs",
            next_step=f"{use_of_bundle(url)}, or name the models it was made from",
        )
    return [entry] if _is_model(entry) else _in_folder(entry, max_depth, order)


def _in_folder(folder: Folder, depth: int, order: Key) -> list[Entry]:
    found: list[Entry] = []
    for name, entry in sorted(folder.entries.items(), key=lambda item: order(item[0])):
        if name.startswith((".", "_")):
            continue
        if not isinstance(entry, Folder):
            found += [entry] if _is_model(entry) else []
        elif not is_bundle(entry):
            if _is_model(entry):
                found.append(entry)
            elif depth > 1:
                found += _in_folder(entry, depth - 1, order)
    return found


def last_name(entry: Entry) -> str:
    """Return the last part of what an entry is called."""
    return entry.last_name if isinstance(entry, Folder) else entry.url.partition("::")[0].rpartition("/")[2]


def _is_model(entry: Entry) -> bool:
    if isinstance(entry, Folder):
        files = {name for name, inner in entry.entries.items() if not isinstance(inner, Folder)}
        return kind_of_folder(files) is not None
    return entry.url.partition("::")[0].endswith(FILE_SUFFIXES)
