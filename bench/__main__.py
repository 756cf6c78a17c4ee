"""Run every benchmark."""

from bench.memory import main

main()
