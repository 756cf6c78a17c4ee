"""Test a zoo for a shared subspace with controls. Each control returns a record, and `evidence` runs all of them."""

from eigenzoo.callable_room import make_callable

make_callable(__name__, "evidence")
