"""The hook that makes the chat demo's model and datasets; a config names it in its ``prepare`` key.

When something is made again, and what is left alone: see ``demo.made``. Knows the other modules of this room.
"""

from __future__ import annotations

from pathlib import Path

from async_rl.config.schema import RunConfig
from async_rl.demo import made
from async_rl.demo.chat import lists, smollm, upcycle

# Two of four experts for a token, each with half of the dense MLP: 214 million parameters, 134 of them for a token.
EXPERTS, TOP_K = 4, 2
_SEED = 0


def prepare(config: RunConfig) -> None:
    """Make model.path, data.train and data.eval unless they are there. A second call returns at once.

    Raises ModelError when the packages that the model comes from are not installed.
    """
    recipe = made.recipe_of(Path(__file__).parent.glob("*.py"))
    made.make_inputs(config, recipe, model=_make_model, sets=lists.train_and_eval, write=lists.write_jsonl)


def _make_model(folder: Path) -> None:
    config, tensors, fields = smollm.read(smollm.find())
    mixture = upcycle.to_mixture(config, tensors, experts=EXPERTS, top_k=TOP_K, seed=_SEED)
    folder.mkdir()
    smollm.write(folder, *mixture, fields)
