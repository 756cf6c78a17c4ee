"""Other people's engines, each in a file of its own; nothing imports them but the commands, and whoever asks for one."""
