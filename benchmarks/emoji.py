"""Builds a folder of pictures for the preset pictures-5w1s: a folder per emoji, a file per vendor.

    npm install emoji-datasource-{apple,google,twitter,facebook}@16.0.0
    python benchmarks/emoji.py node_modules pictures

The four packages hold the same emoji, drawn by each vendor, as RGBA of 64x64 pixels (340 MB to
download). An emoji that one of them lacks is left out, and so are skin tones: 1,857 classes of four
pictures remain.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

VENDORS = ("apple", "google", "twitter", "facebook")


def build(packages: Path, out: Path) -> int:
    """Copies the pictures, and returns the number of classes."""
    listed = json.loads((packages / "emoji-datasource-apple" / "emoji.json").read_text("utf-8"))
    num_classes = 0
    for emoji in listed:
        files = {
            vendor: packages / f"emoji-datasource-{vendor}" / "img" / vendor / "64" / emoji["image"]
            for vendor in VENDORS
        }
        if all(file.is_file() for file in files.values()):
            folder = out / emoji["short_name"].replace("/", "-")
            folder.mkdir(parents=True)
            for vendor, file in files.items():
                shutil.copy(file, folder / f"{vendor}.png")
            num_classes += 1
    return num_classes


def main() -> int:
    """Builds the folder that the command line names, and returns the exit code."""
    parser = argparse.ArgumentParser(description="Builds a folder of emoji.")
    parser.add_argument("packages", type=Path, help="node_modules, with the four packages")
    parser.add_argument("out", type=Path, help="folder to make")
    args = parser.parse_args()
    try:
        num_classes = build(args.packages, args.out)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {num_classes} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
