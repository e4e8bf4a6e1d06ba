"""The command line: one file a command, nothing but parsing and calling."""
