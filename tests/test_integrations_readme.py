"""The stacks as the page shows them: every snippet runs as it stands, with what its text takes for granted."""

import re
from pathlib import Path

import accelerate
import lightning
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from test_integrations_lightning import Stock, data, fitted
from test_integrations_transformers import arguments, llama, rows
from torch.utils.data import DataLoader, TensorDataset

import functional_sam.sharpness
from functional_sam import SharpnessAware

PAGE = (Path(functional_sam.sharpness.__file__).parent / "README.md").read_text()


def snippet(word):
    (block,) = [block for block in re.findall(r"```python stack\n(.*?)```", PAGE, re.DOTALL) if word in block]
    assert sum(1 for line in block.splitlines() if line.strip()) <= 5
    return compile(block, f"README.md, {word}", "exec")


def test_transformers(tmp_path):
    names = {"model": llama(), "args": arguments(tmp_path, max_steps=2), "rows": rows()}
    exec(snippet("SharpnessAwareTrainer"), names)
    assert isinstance(names["trainer"], transformers.Trainer)
    assert names["trainer"].sharpness.steps == 2


def test_accelerate():
    try:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = torch.nn.Linear(4, 3)
        loader = DataLoader(TensorDataset(torch.randn(12, 4), torch.arange(12) % 3), batch_size=2)
        model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)
        names = {"accelerator": accelerator, "model": model, "optimizer": optimizer, "loader": loader}
        names["SharpnessAware"] = SharpnessAware
        (line,) = re.findall(r"`(from functional_sam.integrations.accelerate import .*?)`", PAGE)
        exec(line, names)
        exec(snippet("Accumulated"), names)
        assert names["sharpness"].sharpness.steps == 3
        assert float(names["loss"]) > 0
    finally:
        for kind in (AcceleratorState, GradientState, PartialState):
            kind._reset_state()


def test_lightning():
    names = {"Net": Stock}
    exec(snippet("SharpnessAwareModule"), names)
    model, trainer = fitted(names["FlatNet"](), data(), max_epochs=1)
    assert isinstance(model, lightning.LightningModule)
    assert model.sharpness.steps == trainer.global_step == 6


@pytest.mark.parametrize("word", ["transformers", "accelerate", "lightning"])
def test_every_stack_is_on_both_pages(word):
    main = (Path(__file__).parents[1] / "README.md").read_text()
    assert f".[{word}]" in PAGE
    assert f"integrations.{word}" in main
