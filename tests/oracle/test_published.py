"""Presets against the published configs of their models, as transformers reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.oracle
pytest.importorskip("transformers", reason="needs torch and transformers (the extra 'oracle')")

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from pyggml.models.known import tensor_sizes  # noqa: E402
from pyggml.models.presets import preset  # noqa: E402
from tests.models.convert import fields_of, tensor_names  # noqa: E402
from tests.models.published import CONFIGS  # noqa: E402


def config_of(name: str) -> Any:
    config = dict(CONFIGS[name])
    return AutoConfig.for_model(config.pop("model_type"), **config)


#: Keys that files need not have -> their defaults.
DEFAULTS = {"rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0}


@pytest.mark.parametrize("name", CONFIGS)
def test_keys(name: str) -> None:
    arch = preset(name)
    ours = {f"{arch.name}.{key}": value for key, value in DEFAULTS.items()} | arch.fields()
    theirs = fields_of(config_of(name))
    del theirs["tokenizer.ggml.model"]
    assert len(theirs) > 10
    assert {key: _plain(ours.get(key)) for key in theirs} == {
        key: _plain(value) for key, value in theirs.items()
    }


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors(name: str) -> None:
    """The names that the converter would write, from a model without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name))
    assert set(tensor_names(model)) == set(tensor_sizes(preset(name)))
