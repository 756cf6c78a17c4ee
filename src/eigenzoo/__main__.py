"""`python -m eigenzoo` is the command `eigenzoo`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; an interruption while its modules load ends as quietly as a later one."""
    try:
        from eigenzoo.cli.app import main as run
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: no output was written\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
