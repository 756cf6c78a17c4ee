"""Merge models: adapters into an adapter, checkpoints into a checkpoint, coefficients into a file of coefficients."""

from eigenzoo.callable_room import make_callable

make_callable(__name__, "merging")
