"""This file puts its folder on the path of the tests, so that all of them can import `builders`."""
