"""The folder of emoji has a class per emoji that all vendors have, and a file per vendor."""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

emoji = importlib.import_module("emoji")


def test_an_emoji_that_a_vendor_lacks_is_left_out(tmp_path):
    listed = [{"short_name": "owl", "image": "1.png"}, {"short_name": "ox", "image": "2.png"}]
    for vendor in emoji.VENDORS:
        package = tmp_path / f"emoji-datasource-{vendor}"
        pictures = package / "img" / vendor / "64"
        pictures.mkdir(parents=True)
        (package / "emoji.json").write_text(json.dumps(listed))
        (pictures / "1.png").write_text(vendor)
    (tmp_path / "emoji-datasource-apple" / "img" / "apple" / "64" / "2.png").touch()
    out = tmp_path / "pictures"
    assert emoji.build(tmp_path, out) == 1
    found = {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*.png")}
    assert found == {f"owl/{vendor}.png": vendor for vendor in emoji.VENDORS}
