"""Hostile bytes: fuzzers of the C++ layout and the Python loader, and a corpus that every test run replays."""
