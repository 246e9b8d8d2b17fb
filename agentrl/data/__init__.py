"""Question files: read, check, mix, and write the demo's."""
