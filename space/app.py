"""The Space. Everything that it shows lives in `neva_hf.space`; here it is only put together.

Settings of the Space (environment variables): `NEVA_MAP`, the map, a repository on the Hub (by default the one that came
with neva-hf); `NEVA_BASE`, the base model, if not the one that the map names; `NEVA_MAPS`, other maps to offer, with
commas between.
"""

from __future__ import annotations

import os

# On ZeroGPU this comes before anything that touches CUDA.
try:
    import spaces
except ImportError:
    spaces = None

from neva_hf.space import page
from neva_hf.space.engine import Engine
from neva_hf.space.jobs import no_gpu

# The model is on CUDA from the start: ZeroGPU lends a GPU to calls, and moves it there then.
engine = Engine.load(os.environ.get("NEVA_MAP") or None, os.environ.get("NEVA_BASE") or None)
on_zero_gpu = spaces is not None and bool(os.environ.get("SPACES_ZERO_GPU"))
others = [name.strip() for name in os.environ.get("NEVA_MAPS", "").split(",") if name.strip()]

demo = page.build(engine, gpu=spaces.GPU if on_zero_gpu else no_gpu, maps=others)

if __name__ == "__main__":
    page.launch(demo)
