"""Jobs and what becomes of them: intake, scheduling, runs, recovery, retention."""
