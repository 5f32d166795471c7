"""How a script ends: its exit codes, and one sentence in place of a traceback for what a user can put right."""

import signal
import sys

import torch


class InputError(ValueError):
    """Something the user can put right; its text is one sentence: what is wrong, what was expected, what to do."""


class TimeLimit(Exception):
    """--max-minutes are over; everything up to the last finished epoch is saved."""


def run_main(main, argv=None, how_to_go_on="--resume goes on after the last finished epoch"):
    """Call main(argv) and return the exit code: a user's mistake becomes one sentence, not a traceback.

    0 finished; 2 bad input, a full disk, no memory left, or a loss that is not finite; 3 --max-minutes over;
    130 Ctrl-C; 143 SIGTERM or SIGHUP. After 3, 130 and 143 the same command with --resume goes on.
    """

    def terminate(signum, frame):
        raise SystemExit(143)

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it: not every terminal or pipe has a ψ
    # a closed terminal ends a run as SIGTERM does, unless nohup ignores it
    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous = {each: signal.signal(each, terminate) for each in ends if signal.getsignal(each) != signal.SIG_IGN}
    try:
        main(argv)
        return 0
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else "Python found none left"
        print(
            f"error: out of memory ({reason}); run fewer at a time on this machine ({how_to_go_on}), or start anew "
            "with a lower --batch-size or --width",
            file=sys.stderr,
        )
        return 2
    except TimeLimit as limit:
        print(limit)
        return 3
    except KeyboardInterrupt:
        print(f"\nstopped by Ctrl-C; {how_to_go_on}", file=sys.stderr)
        return 130
    except SystemExit as stop:
        if stop.code == 143:
            print(f"\nstopped by a signal; {how_to_go_on}", file=sys.stderr)
        return stop.code or 0
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def is_out_of_memory(error):
    """Whether a GPU or the machine had no memory left; only torch's own store of GPU memory has an exception for it."""
    said = ("can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED", "unable to find an engine")
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or any(text in str(error) for text in said)
