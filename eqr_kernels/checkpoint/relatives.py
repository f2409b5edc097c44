"""Relatives of EqR whose checkpoints look like its own but hold another model; they are refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_REMEDY = "use a checkpoint of EqR, or of TRM without puzzle embeddings, or train a model with `eqr train`"


def refuse_other_models(state_dict: Mapping[str, Tensor], where: str) -> None:
    """Raises where weights belong to an HRM, a TRM with puzzle embeddings or another number of latent states.

    The names are those of github.com/sapientinc/HRM and github.com/SamsungSAILMontreal/TinyRecursiveModels.

    Args:
        state_dict: weights by names without prefixes.
        where: the file, for the message.

    Raises:
        RuntimeError: what was found, why it does not fit, and what to do.
    """
    puzzle_embeddings = ""
    for name, tensor in state_dict.items():
        if "puzzle_emb" in name.split("."):
            puzzle_embeddings = f"puzzle embeddings ({name} {list(tensor.shape)})"
            break
    levels = {level: _layers(state_dict, level) for level in ("H_level", "L_level")}
    if levels["H_level"]:
        signs = [f"{level} of {layers} layers" for level, layers in levels.items() if layers]
        signs += [puzzle_embeddings] if puzzle_embeddings else []
        raise RuntimeError(
            f"{where}: has {', '.join(signs)}: an HRM or a baseline of its kind. EqR iterates one network, L_level, on "
            f"both latent states, so this library does not run it; {_REMEDY}"
        )
    if puzzle_embeddings:
        raise RuntimeError(
            f"{where}: has {puzzle_embeddings}, as HRM and the original TRM do: its tokens stand behind learned ones "
            "that name the puzzle, and q_halt is read off the first of those. EqR and the TRM of its repository have "
            "the puzzle's tokens alone, so this model can't be run; use a checkpoint trained with puzzle_emb_ndim=0 "
            "and puzzle_emb_len=0, or train a model with `eqr train`"
        )
    for name in ("embed_pos.embedding_weight", "absolute_pos_embedding"):
        if name in state_dict:
            raise RuntimeError(f"{where}: has position embeddings ({name}); supported are rope, rope2d and none")
    starts = sorted(name for name in state_dict if re.fullmatch(r"[A-Za-z]\d*_init", name))
    if starts and starts != ["H_init", "L_init"]:
        raise RuntimeError(
            f"{where}: keeps start states for {', '.join(starts)}, a TRM with another number of latent states; EqR has "
            f"two, H_init and L_init. {_REMEDY[0].upper()}{_REMEDY[1:]}"
        )


def _layers(state_dict: Mapping[str, Tensor], level: str) -> int:
    matches = (re.match(rf"{level}\.layers\.(\d+)\.", name) for name in state_dict)
    return len({match[1] for match in matches if match})
