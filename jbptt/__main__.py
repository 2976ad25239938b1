"""`python -m jbptt` is the command `jbptt`."""

from jbptt.report.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
