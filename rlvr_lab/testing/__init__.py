"""Checks that the library reproduces recorded computations of official code. Used by tests and from a shell."""
