"""Signals that tell a run to save, or to save and stop."""

import os
import signal
import sys
from contextlib import suppress

from support import commands
from support.processes import Links, largest, meet, rank_and_count

# Windows lacks SIGHUP and SIGUSR1.
STOPPING = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
SAVING = getattr(signal, "SIGUSR1", None)


class Signals:
    """Remembers what arrives, so that the loop can answer after its update.

    The first SIGINT, SIGTERM or SIGHUP (the terminal was closed) means: save and stop. SIGUSR1
    means: save and go on. Slurm can send it before a job's time is over.
    """

    def __init__(self):
        self.stop = self.save = Links.stopped = 0  # the number of the signal; 0: none came
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self.receive_stop)
        if SAVING:
            signal.signal(SAVING, self.receive_save)

    def receive_save(self, number, frame):
        self.save = number

    def receive_stop(self, number, frame):
        """The first signal is remembered. A second one ends the program at once; with several
        processes it is ignored, because torchrun sends them the same signal again."""
        rank, count = rank_and_count()
        self.stop = Links.stopped = number
        for each in STOPPING:
            if signal.getsignal(each) == self.receive_stop:
                signal.signal(each, signal.SIG_IGN if count > 1 else signal.SIG_DFL)
        if rank == 0:
            again = "; a second signal stops at once" if count == 1 else ""
            what = "stopping after this update (or after this evaluation and one update)"
            with suppress(OSError):  # whoever read stderr may have got the signal too
                os.write(2, f"\n{what}{again}\n".encode())

    def agreed(self):
        """→ (the signal to stop, the signal to save) that any process received, 0 for none.

        It waits for the other processes, but for no GPU.
        """
        saving, self.save = self.save, 0  # each one is answered once
        return tuple(map(int, largest([self.stop, saving])))


def exit_after_signal(number, step, output_dir):
    """Ends the program after signal `number`, as soon as all processes call this."""
    meet()  # before one ends: torchrun then ends the others
    continues = f"--resume continues from {output_dir}/checkpoint-{step}"
    try:
        print(f"stopped  after update {step}; {continues}", flush=True)
    except OSError:  # whoever read stdout may have got the signal too
        commands.discard_output(sys.stdout)
    sys.exit(128 + number)
