"""The commands of the command line: each reads its options, works, and returns an exit code."""
