"""``python -m lorastack``: the command, where its script is not on the path."""

from __future__ import annotations

from lorastack.cli import main

if __name__ == "__main__":
    main()
