"""The one way to disk: history, index, backups, restore, videos and posters."""
