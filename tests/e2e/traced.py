"""Run the command line and keep a copy of what the product itself printed: `traced.py COPY ARGUMENT…`."""

import sys
from pathlib import Path

PRINTERS = ("utils/console.py", "utils/streams.py")  # the package's only two modules that print


class Traced:
    """A stream that also copies what was written by way of one of the package's printers."""

    def __init__(self, stream, copy):
        self._stream, self._copy = stream, copy

    def write(self, text):
        frame = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.endswith(PRINTERS):
            frame = frame.f_back
        if frame is not None:
            self._copy.write(text)
            self._copy.flush()
        return self._stream.write(text)

    def __getattr__(self, name):
        return getattr(self._stream, name)


if __name__ == "__main__":
    copy = Path(sys.argv.pop(1))
    sys.stdout = Traced(sys.stdout, copy.with_suffix(".out").open("a", encoding="utf-8"))
    sys.stderr = Traced(sys.stderr, copy.with_suffix(".err").open("a", encoding="utf-8"))
    from finetune.cli.main import main

    main()
