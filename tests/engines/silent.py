"""A rank that starts and never says a word."""

import time

time.sleep(3600)
