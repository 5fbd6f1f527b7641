"""Hostile bytes: fuzzers of the C++ layout and the Python loader; every test run replays their corpus."""
