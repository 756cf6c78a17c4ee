"""How long a test waits for something that always comes: a guard against hanging, and no limit of time."""

HANG_SECONDS = 600.0
