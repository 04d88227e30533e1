"""The verbs, nothing else. Each is imported when it is called, so that --help answers at once."""

import os
import sys
import traceback
from typing import Any

VERBS = {
    "fit": "train; without options the embedded demo",
    "validate": "compute the validation metrics of a checkpoint",
    "test": "the same on the test split",
    "predict": "generate audio for every caption of a split",
    "tokenize": "turn a folder of audio and captions into code shards",
    "generate": "turn prompts into audio files",
    "evaluate": "score audio of any origin, or a model, against a reference",
    "convert": "audiocraft's models to releases of ours, and back; checkpoints to releases",
    "sweep": "run an ablation file without a W&B server, here or as a SLURM array",
    "doctor": "say whether a run of fit would start and last, and what it would take; with fit's options",
    "dashboard": "lay out what runs log as a workspace of W&B",
    "bench": "measure attention, training and decoding, each beside its slow twin",
}


def usage() -> str:
    """What `--help` prints."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {text}" for name, text in VERBS.items())
    return f"usage: python -m magnet_train VERB [options]\n\n{verbs}\n\n`VERB --help` lists a verb's options."


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0 done, 1 failed, 2 the user's mistake."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        from magnet_train import __version__

        print(__version__)
        return 0
    if argv[0] not in VERBS:
        print(f"error: no verb {argv[0]!r}; choose one of {', '.join(VERBS)}", file=sys.stderr)
        return 2

    from magnet_train.common.errors import UserError

    try:
        from magnet_train.cli import commands as cli

        cli.run(argv[0], argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        _end_failed(2)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception:
        _end_failed(1)
        raise
    return 0


def _end_failed(status: int) -> None:
    """Ends W&B's run; and under NCCL the process, whose own ending would wait for ranks that wait for this one.

    Then SLURM, torchrun or Lightning ends the others too, and not half an hour later.
    """
    tracking: Any = sys.modules.get("magnet_train.tracking.wandb_session")
    if tracking is None:
        return
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_initialized() or dist.get_world_size() == 1 or dist.get_backend() != "nccl":
        tracking.finish_wandb(status)
        return
    if status == 1:  # nobody else will say why
        traceback.print_exc()
    tracking.finish_wandb(status, quickly=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
