"""common.knn_accuracy against plain loops."""

import ast
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F


def plain_knn(queries, target, bank, labels, k):
    """Share of queries whose class the K nearest rows tell, each with a vote of exp(cosine / 0.07)."""
    right = 0
    for q, t in zip(queries.tolist(), target.tolist(), strict=True):
        cosines = [sum(x * y for x, y in zip(q, row, strict=True)) for row in bank.tolist()]
        votes = Counter()
        for j in sorted(range(len(bank)), key=lambda j: -cosines[j])[:k]:
            votes[labels[j].item()] += math.exp(cosines[j] / 0.07)
        right += votes.most_common(1)[0][0] == t
    return right / len(target)


@pytest.mark.parametrize("n", [30, 700])
def test_knn_accuracy_is_that_of_plain_loops_on_one_and_two_processes(launch, n):
    """Shards of unequal size, fewer images than 200; class -1, of unreadable files, neither asks nor is heard."""
    gen = torch.Generator().manual_seed(n)
    labels, target = torch.randint(8, (n,), generator=gen), torch.randint(8, (41,), generator=gen)
    classes = 1.5 * torch.randn(8, 6, generator=gen, dtype=torch.float64)
    bank, queries = (classes[x] + torch.randn(len(x), 6, generator=gen) for x in (labels, target))
    bank, queries = F.normalize(bank), F.normalize(queries)
    want = {f"knn_{k}": plain_knn(queries[3:], target[3:], bank[9:], labels[9:], k) for k in (1, 200)}
    labels[:9] = target[:3] = -1
    torch.save((queries.float(), target, bank.float(), labels), launch.path / "given.pt")
    code = """
        import torch, common
        common.setup()
        print(common.knn_accuracy(*(x[slice(*common.shard(len(x)))] for x in torch.load("given.pt"))))
    """
    for world in (1, 2):
        job = launch(code, world)
        assert job.codes == [0] * world, job.err
        assert all(ast.literal_eval(out) == pytest.approx(want) for out in job.out), world
    assert 0.2 < want["knn_1"] < 1
