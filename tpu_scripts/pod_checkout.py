"""Where the scripts lie. Imported first, because it makes partinf of the same checkout importable where it is not installed."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
