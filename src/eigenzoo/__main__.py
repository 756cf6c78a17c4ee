"""`python -m eigenzoo`."""

from eigenzoo.cli.app import main

main()
