"""The command line: one thin command a file; what is heavy is imported inside the commands."""
