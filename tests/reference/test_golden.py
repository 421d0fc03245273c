"""A really pretrained model, loaded by `load_model`, writes the text that its authors' own test expects."""

import pytest
import torch

from pipeline.modeling import check_model, load_model, load_tokenizer
from tests.standins import CPU, REAL, model_config

STORIES = REAL / "models" / "stories260K"
pytestmark = pytest.mark.skipif(not STORIES.exists(), reason=f"needs {STORIES}, which is no part of the project")


def continuation(model: torch.nn.Module, begin: int) -> torch.Tensor:
    """200 greedy steps, as llama2.c's test makes them: the end token does not stop it."""
    ids = torch.tensor([[begin]])
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0)[0]


def test_greedy_text_is_reproduced_byte_for_byte() -> None:
    config = model_config(STORIES)
    check_model(config)
    tokenizer = load_tokenizer(config)
    ids = continuation(load_model(config, CPU), tokenizer.bos_token_id)
    expected = (STORIES / "golden_greedy.txt").read_text(encoding="utf-8")
    assert tokenizer.decode(ids, skip_special_tokens=True) == expected


def test_a_slightly_wrong_model_writes_something_else() -> None:
    """Negative control."""
    config = model_config(STORIES)
    tokenizer, model = load_tokenizer(config), load_model(config, CPU)
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight[:8] *= 1.5
        model.model.layers[1].mlp.down_proj.weight *= 1.02
    text = tokenizer.decode(continuation(model, tokenizer.bos_token_id), skip_special_tokens=True)
    assert text != (STORIES / "golden_greedy.txt").read_text(encoding="utf-8")
