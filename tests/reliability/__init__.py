"""What docs/reliability.md promises, tried: `make reliability` runs it all and prints the counts."""
