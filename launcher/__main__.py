"""``python -m launcher``."""

import sys

try:
    from launcher.cli import main
except ModuleNotFoundError as error:
    sys.exit(
        f"error: {error.name} is not installed for {sys.executable}: `make setup`, then `source "
        ".env/bin/activate`"
    )

if __name__ == "__main__":
    main()
