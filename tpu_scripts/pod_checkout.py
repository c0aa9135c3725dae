"""Where the scripts lie. Imported first, because partinf is that of the same checkout, whichever is installed."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
