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
from model import answer_positions, local

STRENGTH = 0.1
plain_step = train.train_step


def l2_step(model, batch, micro_tokens, mix_weight, reference):
    """The step of loss + STRENGTH / 2 x |theta - theta_A|^2."""
    found = plain_step(model, batch, micro_tokens, mix_weight)
    distance = torch.zeros((), dtype=torch.float64, device=local(next(model.parameters())).device)
    for param, start in zip(model.parameters(), reference().parameters()):
        away = local(param).detach() - local(start)
        local(param.grad).add_(away, alpha=STRENGTH)
        distance += away.double().square().sum()
    dist.all_reduce(distance)
    found.loss += STRENGTH / 2 * distance.item()
    return found


def kl_step(model, batch, micro_tokens, mix_weight, reference):
    """The step of loss + STRENGTH x the mean over answer tokens of KL(theta_A || theta)."""
    found, total = plain_step(model, batch, micro_tokens, mix_weight), 0
    share = STRENGTH / sum(found.answer_tokens.values())
    for ids, labels, _, packed in train.collate(batch, micro_tokens, model.model.embed_tokens.weight.device):
        places, _ = answer_positions(labels)
        with torch.no_grad():
            theirs = reference()(ids, logit_positions=places, packed=packed).float().log_softmax(-1)
        ours = model(ids, logit_positions=places, packed=packed).float().log_softmax(-1)
        divergence = share * F.kl_div(ours, theirs, reduction="sum", log_target=True)
        (divergence * dist.get_world_size()).backward()
        total += divergence.detach()
    dist.all_reduce(total)
    found.loss += total.item()
    return found


if __name__ == "__main__":
    train.train_step = {"l2": l2_step, "kl": kl_step}[sys.argv.pop(1)]
    train.main()
