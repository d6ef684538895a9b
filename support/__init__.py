"""What any program of this kind needs: config parsing, careful files, schemas of JSON, the machine, exit codes and more.

Knows no model, no run and no paper, and imports nothing of this project but itself.
"""
