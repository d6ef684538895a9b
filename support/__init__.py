"""What any program of this kind needs: config parsing, careful files, JSON schemas, the machine, exit codes, colours.

Knows no model, no run and no paper, and imports nothing of this project but itself.
"""
