"""Encoding ahead of training: `python -m localdit.training.encode --help` lists the options.

Latents and text states are written in shards. A shard appears whole or not at all, so that after an
end of any kind the same command goes on where it was; and it depends on the data, the encoders and
the options alone, so that any number of processes may share the work.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from localdit.training.encode.options import PROGRAM, parse_args
from localdit.training.leaving import run_and_leave

if TYPE_CHECKING:
    from accelerate import Accelerator

    from localdit.training.agreement import Agreement


def main(argv: Sequence[str] | None = None) -> int:
    """Encode: look at the data, say what disk it takes, write the shards that are not there.

    Returns:
        The exit code: 0, or 1 if something was missing or wrong, which is told in a line.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_args(argv)

    from localdit.machine import hide_loading_bars
    from localdit.training.agreement import Agreement, TrainingStopped
    from localdit.training.encode.folder import check_folder, open_folder
    from localdit.training.encode.job import encode, prepare, report

    hide_loading_bars()
    accelerator = _start_processes()
    agreement, is_main = Agreement(accelerator), accelerator.is_main_process
    command = shlex.join([*PROGRAM.split(), *argv])
    try:
        job = agreement.on_all(
            lambda: prepare(args, command, accelerator.device, quiet=not is_main)
        )
        _require_same(agreement, job.manifest.digest())
        agreement.on_main(lambda: check_folder(args.output, job.manifest))
        if is_main:
            print(job.describe(args.output), flush=True)
        agreement.on_main(lambda: job.require_space(args.output))
        if args.dry_run:
            return 0
        empty_text = job.empty_text()
        shards = agreement.on_main(lambda: open_folder(args.output, job.manifest, empty_text))
        share = shards[accelerator.process_index :: accelerator.num_processes]
        agreement.on_all(lambda: encode(args, job, share, quiet=not is_main))
        summary = agreement.on_main(lambda: report(args, job))
        if is_main:
            print(summary)
    except TrainingStopped as stopped:
        if is_main:
            print(f"{PROGRAM}: error: {stopped}", file=sys.stderr)
        return 1
    finally:
        accelerator.end_training()
    return 0


def _start_processes() -> Accelerator:
    """Join the processes that `accelerate launch` or `torchrun` started, if one did.

    They wait for one another as long as a day: the last shard of one may take a while.
    """
    from datetime import timedelta

    from accelerate import Accelerator, InitProcessGroupKwargs

    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))])
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        sys.exit(
            f"{PROGRAM}: error: {started} processes were started, but they don't know of one "
            "another. On CPUs, set ACCELERATE_USE_CPU=true."
        )
    return accelerator


def _require_same(agreement: Agreement, digest: str) -> None:
    """Make sure that all processes mean the same set."""
    from localdit.training.agreement import TrainingStopped

    if len(set(agreement.gathered([digest]))) > 1:
        raise TrainingStopped(
            "The processes see different data or encoders. Give all of them the same files."
        )


if __name__ == "__main__":
    run_and_leave(main)
