"""SIGTERM and Ctrl-C held back until a training can stop without losing anything."""

import logging
import signal
from typing import Any

logger = logging.getLogger(__name__)


class StopRequest:
    """Holds SIGTERM and Ctrl-C back until the step is done; a second one acts at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: whoever started this one handles signals
                break
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        logger.info("%s: finishing this step, then a checkpoint; once more to stop at once", self.received)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
