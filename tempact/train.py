"""`python -m tempact.train [PRESET] [--section.field value ...]`: trains a planner and an executor."""

from __future__ import annotations

import sys

from tempact.cli import callable_command, of_ranks, parse_run, to_yaml
from tempact.config import check_exact

EXIT_DOES_NOT_FIT = 4


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 an unexpected exception, 2 bad input, 3 the run could not go on, 4 a dry run that fits into
    no device, 130 stopped by a signal, 128 + n one of several processes ended by the signal n.

    What is done is saved in each case.
    """
    return of_ranks(lambda: _train(sys.argv[1:] if argv is None else argv))


def _train(arguments: list[str]) -> int:
    config, options = parse_run(arguments, "python -m tempact.train")
    check_exact(config)
    if options.dry_run:
        from tempact.diagnostics.dry_run import dry_run

        lines, fits = dry_run(config, options.gpu_gib, max(1, options.gpus))
        # the plan is a comment: what is printed is still a file that --config reads
        sys.stdout.write("".join([to_yaml(config), *(f"# {line}".rstrip() + "\n" for line in lines)]))
        return 0 if fits else EXIT_DOES_NOT_FIT
    if options.gpus or options.max_restarts:
        from tempact.distributed.launch import launched

        code = launched("tempact.train", arguments, config.device, options.gpus, options.max_restarts)
        if code is not None:
            return code
    from tempact.runs.logs import starting

    starting()
    from tempact.runs.ending import RunFailed
    from tempact.runs.run import train

    try:
        result = train(config, options.resume)
    except RunFailed as error:
        sys.stderr.write(f"error: {error}\n")
        return error.code
    sys.stdout.write("".join(f"{line}\n" for line in result.lines))
    return result.exit_code


callable_command(__name__, "tempact.runs.run")

if __name__ == "__main__":
    sys.exit(main())
