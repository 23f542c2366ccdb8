import sys

if __name__ == "__main__":
    from benchmarks.steps.command import main

    sys.exit(main())
