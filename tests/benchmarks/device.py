"""The rates with which the tests' hand calculations divide, whatever was recorded since."""

DEVICE = {"arithmetic": 743e12, "memory": 3.03e12, "cache": 7.5e12, "shared": 743e12 / 32}
