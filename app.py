"""Start the app from a checkout: `python app.py`. All of it is in `mochi_app/app.py`."""

import sys

from mochi_app.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
