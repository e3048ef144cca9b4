"""The engine: slots of persistent rank processes that run Mochi."""
