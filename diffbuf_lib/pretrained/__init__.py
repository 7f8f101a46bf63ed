"""Models that come with the package: diffbuf/NAME is the folder NAME beside this file."""

from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = sorted(f"diffbuf/{path.parent.name}" for path in FOLDER.glob("*/config.json"))
DEFAULT = "diffbuf/cpu-demo"  # what the commands take without --model
