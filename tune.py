"""Search hyper-parameters of Codebook-NeRF: `python tune.py --scenes all`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    try:
        from cbnerf.search.command import main
    except ModuleNotFoundError as error:
        sys.exit(f"tune.py: {error.name} is missing; pip install 'cbnerf[search]'")
    except ImportError as error:  # a package that does not fit this machine or the others
        sys.exit(f"tune.py: {error}")
    main(default_config=Path(__file__).parent / "tune_configs" / "default.yaml")
