"""The commands of the command line: thin, each reads, calls one pure function and prints."""
