"""The entry point: names the verbs, imports the one that is called, and sets the exit status."""

import io
import os
import select
import sys
import traceback
from typing import Any

VERBS = {
    "fit": "train; without options, train the demo",
    "validate": "compute the validation metrics of a checkpoint",
    "test": "compute the same metrics on the test split",
    "predict": "generate audio for every caption of a split",
    "tokenize": "encode audio with captions into code shards",
    "generate": "generate audio files from prompts",
    "edit": "regenerate regions of a recording, continue it, or make it a loop",
    "evaluate": "score folders of audio, or a model, against a reference",
    "convert": "convert audiocraft models to releases and back, and checkpoints to releases",
    "sweep": "run an ablation file without a W&B server, locally or as a SLURM array",
    "doctor": "check whether fit with the same options would start and keep running",
    "dashboard": "create a W&B workspace with panels for all logged metrics",
    "bench": "measure time and memory of attention, training and decoding",
    "app": "serve a local web app to generate, edit and compare",
}


def usage() -> str:
    """Text of `--help`."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {text}" for name, text in VERBS.items())
    head = "usage: python -m magnet_train VERB [options]"
    tail = (
        "`VERB --help` lists the options of a verb, `--version` prints the version, and\n"
        "`--print_completion bash` (or zsh) prints a script for tab completion of magnet-train."
    )
    return f"{head}\n\n{verbs}\n\n{tail}"


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0 = done, 1 = failed, 2 = user error."""
    argv = sys.argv[1:] if argv is None else argv
    verb = argv[0].replace("--print-completion", "--print_completion") if argv else "--help"
    if verb not in (*VERBS, "--print_completion"):
        return _answer(verb)

    _prepare_process()
    from magnet_train.common.errors import user_error_from

    try:
        from magnet_train.cli import commands

        if verb in VERBS:
            commands.run(verb, argv[1:])
        else:
            commands.print_completion("".join(argv[1:2]), VERBS)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `… | head` has read enough
        if not _is_output_closed():
            raise
        return 141
    except Exception as error:
        mistake = user_error_from(error)
        if _other_ranks_wait():
            _exit_now(1 if mistake is None else 2, mistake)
        _finish_wandb(1 if mistake is None else 2)
        if mistake is None:
            raise
        sys.stdout.flush()
        print(f"error: {mistake}", file=sys.stderr, flush=True)  # the last line on the screen
        return 2
    return 0


def _answer(word: str) -> int:
    """Print the help, the version, or that there is no such verb."""
    if word in ("-h", "--help"):
        print(usage())
        return 0
    if word == "--version":
        from magnet_train import __version__

        print(__version__)
        return 0
    from difflib import get_close_matches

    close = get_close_matches(word, VERBS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(VERBS)}"
    print(f"error: no verb {word!r}; {hint}", file=sys.stderr)
    return 2


def _is_output_closed() -> bool:
    """Whether the reader of the output has gone; then discard further output, because Python's
    flush at exit would fail."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    is_closed = bool(poll.poll(0))  # POLLERR is reported even if not requested
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_closed


def _prepare_process() -> None:
    """Set what torch reads when it is imported, and print any name to any terminal."""
    # Threads that spin while they wait take the core of another process: with one of two cores
    # busy, a training step takes ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _other_ranks_wait() -> bool:
    """Whether this is a rank under NCCL: its exit would wait for ranks that wait for this one."""
    dist: Any = sys.modules.get("torch.distributed")
    return (
        dist is not None
        and dist.is_initialized()
        and dist.get_world_size() > 1
        and dist.get_backend() == "nccl"
    )


def _exit_now(status: int, mistake: Exception | None) -> None:
    """End the process at once, so that SLURM, torchrun or Lightning ends the other ranks too."""
    if mistake is None:
        traceback.print_exc()
    else:
        print(f"error: {mistake}", file=sys.stderr, flush=True)
    _finish_wandb(status, quickly=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _finish_wandb(status: int, **settings: bool) -> None:
    session: Any = sys.modules.get("magnet_train.tracking.wandb_session")
    if session is not None:
        session.finish_wandb(status, **settings)


if __name__ == "__main__":
    sys.exit(main())
