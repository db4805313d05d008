"""`python -m tempact.train [PRESET] [--section.field value ...]`: trains a planner and an executor."""

from __future__ import annotations

import sys

from tempact.cli import callable_command, parse_run, to_yaml
from tempact.errors import guarded

EXIT_DOES_NOT_FIT = 4


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 an unexpected exception, 2 bad input, 3 the run could not go on, 4 a dry run that fits into
    no device, 130 stopped by a signal.

    What is done is saved in each case.
    """
    return guarded(lambda: _train(argv))


def _train(argv: list[str] | None) -> int:
    config, options = parse_run(argv, "python -m tempact.train")
    if options.dry_run:
        from tempact.diagnostics.dry_run import dry_run

        lines, fits = dry_run(config, options.gpu_gib)
        # the plan is a comment: what is printed is still a file that --config reads
        sys.stdout.write("".join([to_yaml(config), *(f"# {line}".rstrip() + "\n" for line in lines)]))
        return 0 if fits else EXIT_DOES_NOT_FIT
    from tempact.runs.logs import starting

    starting()
    from tempact.runs.run import RunFailed, train

    try:
        result = train(config, options.resume)
    except RunFailed as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write("".join(f"{line}\n" for line in result.lines))
    return result.exit_code


callable_command(__name__, "tempact.runs.run")

if __name__ == "__main__":
    sys.exit(main())
