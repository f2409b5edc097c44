"""The Engine over HTTP: the app, what it accepts and answers, its metrics, its log, and the page that shows a solve.

Importing this imports FastAPI, uvicorn and prometheus_client, which the extra `serve` brings.
"""

from importlib.util import find_spec

_missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
if _missing:
    raise ImportError(f"serving over HTTP needs {', '.join(_missing)}: pip install 'eqr_kernels[serve]'")
