"""What goes wrong on request, a number of times."""

import threading
from dataclasses import dataclass


@dataclass
class Fault:
    kind: str
    times: float
    suffix: str = ""
    after_bytes: int | None = None
    status: int = 0


class Faults:
    """Those that have yet to happen.

    Attributes:
        faults: in the order in which they were asked for.
        lock: for everything that requests change.
    """

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    def cut_uploads(self, times: float, after_bytes: int) -> None:
        """Close the connection of the next uploads of large files after so many bytes."""
        self.faults.append(Fault("cut upload", times, after_bytes=after_bytes))

    def cut_commits(self, times: float) -> None:
        """Close the connection of the next commits when half of one was read."""
        self.faults.append(Fault("cut commit", times))

    def refuse_commits(self, status: int, times: float) -> None:
        """Answer the next commits with an error."""
        self.faults.append(Fault("refuse commit", times, status=status))

    def corrupt_downloads(self, suffix: str, times: float) -> None:
        """Flip bytes in the last quarter of the next downloads of files named so."""
        self.faults.append(Fault("corrupt", times, suffix))

    def truncate_downloads(self, suffix: str, times: float) -> None:
        """Close the connection halfway through the next downloads of files named so."""
        self.faults.append(Fault("truncate", times, suffix))

    def take_fault(self, kind: str, path: str = "") -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.kind == kind and path.endswith(fault.suffix):
                    fault.times -= 1
                    self.faults = [it for it in self.faults if it.times > 0]
                    return fault
        return None
