"""train.py with a penalty on what a stage changes, added from outside:

    python tests/penalties.py l2 OPTIONS    # on the distance of the weights from those it started from (theta_A)
    python tests/penalties.py kl OPTIONS    # on the divergence of the answers' probabilities from theta_A's

Options are those of train.py, and so are the launchers, the saves and --resume.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import torch.nn.functional as F

import train
from model import local

STRENGTH = 0.1


def l2(model, batch, reference):
    """STRENGTH / 2 x |theta - theta_A|^2."""
    distance = torch.zeros((), dtype=torch.float64, device=local(next(model.parameters())).device)
    for param, start in zip(model.parameters(), reference().parameters()):
        away = local(param).detach() - local(start)
        local(param.grad).add_(away, alpha=STRENGTH)
        distance += away.double().square().sum()
    return STRENGTH / 2 * distance


def kl(model, batch, reference):
    """STRENGTH x the mean over answer tokens of KL(theta_A || theta)."""
    share, total = STRENGTH / sum(train.count_answer_tokens(batch).values()), 0
    for part in train.collate(batch, micro_tokens=10_000, device=model.model.embed_tokens.weight.device):
        places = (part.rows, part.columns)
        with torch.no_grad():
            theirs = reference()(part.ids, logit_positions=places, packed=part.packed).float().log_softmax(-1)
        ours = model(part.ids, logit_positions=places, packed=part.packed).float().log_softmax(-1)
        divergence = share * F.kl_div(ours, theirs, reduction="sum", log_target=True)
        (divergence * dist.get_world_size()).backward()
        total += divergence.detach()
    return total


if __name__ == "__main__":
    train.main({"l2": l2, "kl": kl}[sys.argv.pop(1)])
