"""`python -m tempact.train [PRESET] [--section.field value ...]`: trains a planner and an executor."""

from __future__ import annotations

import os
import sys

from tempact.cli import RunOptions, callable_command, parse_run, to_yaml, without
from tempact.errors import UserError, guarded

EXIT_DOES_NOT_FIT = 4


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 an unexpected exception, 2 bad input, 3 the run could not go on, 4 a dry run that fits into
    no device, 130 stopped by a signal, 128 + n one of several processes ended by the signal n.

    What is done is saved in each case.
    """
    code = guarded(lambda: _train(sys.argv[1:] if argv is None else argv))
    if "tempact.distributed" in sys.modules:
        from tempact.distributed import leave

        leave(code)
    return code


def _train(arguments: list[str]) -> int:
    config, options = parse_run(arguments, "python -m tempact.train")
    if options.dry_run:
        from tempact.diagnostics.dry_run import dry_run

        lines, fits = dry_run(config, options.gpu_gib, max(1, options.gpus))
        # the plan is a comment: what is printed is still a file that --config reads
        sys.stdout.write("".join([to_yaml(config), *(f"# {line}".rstrip() + "\n" for line in lines)]))
        return 0 if fits else EXIT_DOES_NOT_FIT
    if starts_processes(options):
        from tempact.distributed.launch import launch, warn_of_few_gpus

        warn_of_few_gpus(config.device, options.gpus)
        return launch(without(arguments, "gpus", "max_restarts"), options.gpus, options.max_restarts)
    from tempact.runs.logs import starting

    starting()
    from tempact.runs.run import RunFailed, train

    try:
        result = train(config, options.resume)
    except RunFailed as error:
        sys.stderr.write(f"error: {error}\n")
        return error.code
    sys.stdout.write("".join(f"{line}\n" for line in result.lines))
    return result.exit_code


def starts_processes(options: RunOptions) -> bool:
    """Does this process start those of the run? UserError for options that ask for it where it cannot."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    if options.gpus and ranks != "1":
        found = f"--gpus: found {options.gpus} in one of {ranks} processes, as torchrun starts them"
        raise UserError(f"{found}; accepted: nothing under torchrun, which has started them already")
    if options.max_restarts and not options.gpus:
        found = f"--max_restarts: found {options.max_restarts} without --gpus"
        raise UserError(f"{found}; accepted: with --gpus N; torchrun has an option of its own")
    return options.gpus > 1 or options.max_restarts > 0


callable_command(__name__, "tempact.runs.run")

if __name__ == "__main__":
    sys.exit(main())
