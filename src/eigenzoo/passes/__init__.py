"""How tasks run: on which threads and device, in how much memory, and what they change of the process meanwhile."""
