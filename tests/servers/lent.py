"""What every server of the tests is: one's own for as long as a `with` lasts."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Lent(ABC):
    """Started by `with`, gone with all that it wrote at the end of it."""

    @abstractmethod
    def start(self) -> None:
        """Return when it serves."""

    @abstractmethod
    def close(self) -> None:
        """The end of it and of everything it wrote."""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
