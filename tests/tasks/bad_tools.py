"""Tools for tests: one that works, and every way not to."""

import sys
import time

number = 5


def upper(argument: str) -> str:
    return argument.upper()


def fail(argument: str) -> str:
    raise ValueError(argument)


def leave(argument: str) -> str:
    sys.exit(3)


def chatty(argument: str) -> str:
    print("noise")
    return argument.upper()


def hang(argument: str) -> str:
    while True:
        time.sleep(0.01)


def hoard(argument: str) -> str:
    return str(len(bytearray(2**40)))


def huge(argument: str) -> str:
    return argument * 10**6
