"""No config, row or record may change its identity: a record whose hash moved would count in no table.

A new config or row is added to pinned_hashes.json by `python tests/test_pinned_hashes.py`; what is pinned stays.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # when this file is run as a script

from papers import TABLES  # noqa: E402
from papers.table import SCALES  # noqa: E402
from run.settings import Config  # noqa: E402
from support import configurator  # noqa: E402

PINNED = Path(__file__).with_name("pinned_hashes.json")


def hashes():
    """{"config/NAME": hash, "TABLE/ROW at SCALE": hash}; a hash is a run_id without its seed."""
    found = {}
    for path in sorted((ROOT / "config").glob("*.py")):
        found[f"config/{path.stem}"] = configurator.parse(Config, [str(path)]).hash()
    for table in TABLES.values():
        for scale in SCALES:
            for row in table.experiments_at(scale):
                found[f"{table.name}/{row.name} at {scale}"] = row.config_at(scale).hash()
    return found


def test_every_config_and_row_keeps_its_hash():
    pinned = json.loads(PINNED.read_text())
    found = hashes()
    changed = {name: (hash, found.get(name)) for name, hash in pinned.items() if found.get(name) != hash}
    assert not changed, f"(pinned, now): {changed}"
    assert found.keys() == pinned.keys(), f"pin the new ones: python {Path(__file__).relative_to(ROOT)}"


def test_every_committed_record_has_the_run_id_of_its_config():
    paths = [path for path in (ROOT / "results").glob("*/*.json") if path.parent.name != "bench"]
    assert paths
    for path in paths:
        record = json.loads(path.read_text())
        assert record["run_id"] == Config.from_dict(record["config"]).run_id, path.name


if __name__ == "__main__":
    pinned = json.loads(PINNED.read_text()) if PINNED.exists() else {}
    PINNED.write_text(json.dumps(hashes() | pinned, indent=1, sort_keys=True) + "\n")
