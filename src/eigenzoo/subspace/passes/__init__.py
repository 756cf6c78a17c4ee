"""How a pass over a zoo runs: its workers, what each may use, and the work that an interruption leaves."""
