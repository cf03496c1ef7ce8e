"""The process ``realfill``: its allocator is chosen before anything heavy is imported."""

from __future__ import annotations

from realfill.allocator import allocator_variables, begin_with


def run() -> None:
    """Begin again with tcmalloc where the system has it, then do what the command line asks for."""
    begin_with(allocator_variables())
    from realfill.cli import main

    main(prog_name="realfill")


if __name__ == "__main__":
    run()
