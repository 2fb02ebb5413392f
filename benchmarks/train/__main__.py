"""``python -m benchmarks.train --help``; the driver is a module of its own so that ranks can import it."""

from .driver import main

main()
