import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import pyggml as gg
from pyggml.backends.cuda.launch import Launch
from pyggml.parity.patterns import pattern
from pyggml.parity.tolerance import nmse
from tests.cuda import emulated

names = [n for n in sys.argv[1:]]
t = time.time()
gs = [pattern(n) for n in names]
pl = [emulated._Planned(g.outputs, g.inputs) for g in gs]
st = emulated.starter(
    Path(tempfile.mkdtemp()), [r for p in pl for r in p.records if isinstance(r, Launch)]
)
print("compile", time.time() - t)
for n, g, p in zip(names, gs, pl):
    t = time.time()
    res = p.run(st)
    exp = gg.compile(g.outputs).run(g.inputs)
    print(
        n,
        round(time.time() - t, 2),
        {
            k: (nmse(res[k], v), bool(np.isfinite(v).all()), bool(np.isfinite(res[k]).all()))
            for k, v in exp.items()
        },
    )
