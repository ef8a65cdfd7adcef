from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_two_ranks
from sklearn.cluster import KMeans
from vector_quantize_pytorch import VectorQuantize

from cbnerf.codebook.quantizer import (
    VectorQuantizer,
    vq_loss,
)
from cbnerf.config import CodebookConfig

HEALTHY = CodebookConfig(size=16, dim=4, normalize=True, ema=True, ema_decay=0.8, revive_below=0.3)


def make_quantizer(config: CodebookConfig) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(config)


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_codes_and_gradients_match_vector_quantize_pytorch():
    ours = make_quantizer(CodebookConfig(size=96, dim=8))
    theirs = VectorQuantize(
        dim=8, codebook_size=96, learnable_codebook=True, ema_update=False, rotation_trick=False
    )
    theirs._codebook.embed.data = ours.codebook.detach().clone()[None]
    own, other = (draw(2, 50, 8).requires_grad_() for _ in range(2))
    found, (codes, indices, loss) = ours(own), theirs(other)
    assert torch.equal(found.indices, indices)
    torch.testing.assert_close(found.latents, codes)
    # Their one loss moves both sides alike.
    upstream = draw(2, 50, 8, seed=3)
    both = found.codebook_loss + found.commitment_loss
    torch.autograd.backward([found.latents, both], [upstream, torch.ones(())])
    torch.autograd.backward([codes, loss.sum()], [upstream, torch.ones(())])
    torch.testing.assert_close(own.grad, other.grad)
    torch.testing.assert_close(ours.codebook.grad, theirs._codebook.embed.grad[0])


def test_cosine_search_matches_vector_quantize_pytorch():
    ours = make_quantizer(CodebookConfig(size=96, dim=8, normalize=True)).eval()
    theirs = VectorQuantize(dim=8, codebook_size=96, use_cosine_sim=True).eval()
    theirs.codebook = ours.codes().detach()
    found, (codes, indices, _) = ours(draw(2, 50, 8)), theirs(draw(2, 50, 8))
    assert torch.equal(found.indices, indices)
    torch.testing.assert_close(found.latents, codes)


def test_latents_are_codes_and_keep_their_shape():
    quantizer = make_quantizer(CodebookConfig(size=7, dim=3))
    quantized = quantizer(draw(2, 5, 4, 3))
    assert quantized.indices.shape == (2, 5, 4)
    torch.testing.assert_close(quantized.latents, quantizer.codebook[quantized.indices])


def test_gradient_passes_straight_through():
    latents = draw(6, 3).requires_grad_()
    upstream = draw(6, 3, seed=3)
    make_quantizer(CodebookConfig(size=7, dim=3))(latents).latents.backward(upstream)
    torch.testing.assert_close(latents.grad, upstream)


@pytest.mark.parametrize("normalize", [False, True])
def test_each_loss_moves_only_its_own_side(normalize: bool):
    quantizer = make_quantizer(CodebookConfig(size=7, dim=3, normalize=normalize))
    latents = draw(20, 3).requires_grad_()
    quantized = quantizer(latents)
    gradient = torch.autograd.grad(
        quantized.codebook_loss, [quantizer.codebook, latents], allow_unused=True
    )
    assert gradient[0].abs().sum() > 0 and gradient[1] is None
    gradient = torch.autograd.grad(
        quantized.commitment_loss, [quantizer.codebook, latents], allow_unused=True
    )
    assert gradient[0] is None and gradient[1].abs().sum() > 0


def test_beta_stands_where_paper_and_released_code_put_it():
    quantizer = make_quantizer(CodebookConfig(size=2, dim=2))
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [4.0, 0.0]]))
    latents = torch.tensor([[1.0, 1.0], [4.0, 2.0]]).requires_grad_()
    quantized = quantizer(latents)
    # Squared distances 1 + 1 and 0 + 4 over 4 elements.
    assert quantized.codebook_loss.item() == quantized.commitment_loss.item() == 1.5
    paper = vq_loss(quantized, CodebookConfig(beta=0.5))
    released = vq_loss(quantized, CodebookConfig(beta=0.5, vq_loss="released"))
    assert paper.item() == released.item() == 2.25
    moves_latents = [
        torch.autograd.grad(loss, latents, retain_graph=True)[0] for loss in (paper, released)
    ]
    torch.testing.assert_close(2 * moves_latents[0], moves_latents[1])


def test_normalized_codes_and_latents_lie_on_the_unit_sphere():
    quantizer = make_quantizer(CodebookConfig(size=7, dim=3, normalize=True))
    latents = draw(20, 3)
    quantized = quantizer(latents)
    torch.testing.assert_close(quantized.latents.norm(dim=-1), torch.ones(20))
    cosines = F.normalize(latents) @ F.normalize(quantizer.codebook).T
    assert torch.equal(quantized.indices, cosines.argmax(1))


def test_moving_averages_match_a_loop_over_codes():
    config = CodebookConfig(size=5, dim=3, ema=True, ema_decay=0.7)
    quantizer = make_quantizer(config)
    codes = quantizer.codebook.clone()
    counts, sums = torch.ones(5), codes.clone()
    for step in range(4):
        latents = draw(40, 3, seed=step)
        chosen = torch.cdist(latents, codes).argmin(1)
        assert torch.equal(quantizer(latents).indices, chosen)
        for i in range(5):
            mine = latents[chosen == i]
            counts[i] = 0.7 * counts[i] + 0.3 * len(mine)
            sums[i] = 0.7 * sums[i] + 0.3 * mine.sum(0)
            codes[i] = sums[i] / counts[i]
        torch.testing.assert_close(quantizer.codebook, codes)
        torch.testing.assert_close(quantizer.usage, counts)


def test_moving_codes_take_no_gradient_and_have_no_codebook_loss():
    quantizer = make_quantizer(CodebookConfig(size=5, dim=3, ema=True))
    assert [parameter.requires_grad for parameter in quantizer.parameters()] == [False]
    assert quantizer(draw(40, 3)).codebook_loss.item() == 0


def test_a_code_that_is_never_used_stays_where_it_is():
    quantizer = make_quantizer(CodebookConfig(size=2, dim=2, ema=True, ema_decay=0.5))
    quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [100.0, 0.0]]))
    quantizer.sums.copy_(quantizer.codebook)
    for step in range(200):  # long enough for its averages to underflow
        quantizer(draw(8, 2, seed=step))
    assert quantizer.usage[1] == 0
    assert quantizer.codebook[1].tolist() == [100.0, 0.0]


@pytest.mark.parametrize("ema", [False, True])
def test_codes_start_as_centres_of_clusters(ema: bool):
    centres = 10 * draw(12, 3, seed=5)
    latents = (centres[:, None] + 0.1 * draw(12, 40, 3)).flatten(0, 1)
    quantizer = make_quantizer(CodebookConfig(size=12, dim=3, ema=ema, revive_below=0.1))
    quantizer.start_from(latents)
    distances = torch.cdist(centres, quantizer.codebook.detach())
    assert sorted(distances.argmin(1).tolist()) == list(range(12))
    assert distances.min(1).values.max() < 0.1
    assert quantizer.usage.tolist() == [40] * 12
    # A batch weighs as much as its step, not more than all that k-means has seen.
    before = quantizer.codebook.detach().clone()
    quantizer(latents[::40] + 1)
    assert (quantizer.codebook - before).abs().max() < 0.1


def test_k_means_ends_no_worse_than_scikit_learns():
    latents = draw(2000, 6)
    quantizer = make_quantizer(CodebookConfig(size=32, dim=6))
    quantizer.start_from(latents)
    theirs = KMeans(32, init="random", n_init=1, max_iter=10, random_state=0).fit(latents.numpy())
    assert quantizer.eval()(latents).commitment_loss * 6 * 2000 < 1.05 * theirs.inertia_


def test_on_the_unit_sphere_k_means_stays_there():
    quantizer = make_quantizer(CodebookConfig(size=8, dim=3, normalize=True, ema=True))
    quantizer.start_from(5 * draw(200, 3))
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(8))


def test_fewer_latents_than_codes_are_all_met():
    quantizer = make_quantizer(CodebookConfig(size=12, dim=3))
    latents = draw(5, 3)
    quantizer.start_from(latents)
    assert torch.cdist(latents, quantizer.codebook.detach()).min(1).values.max() < 1e-3


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("ema", [False, True])
def test_dead_codes_come_back_as_latents_and_live_ones_stay(ema: bool, normalize: bool):
    config = CodebookConfig(
        size=6, dim=3, ema=ema, ema_decay=0.5, revive_below=0.2, normalize=normalize
    )
    quantizer = make_quantizer(config)
    dead = torch.tensor([False, True, False, True, True, False])
    quantizer.usage.copy_(torch.where(dead, 0.1, 5.0))
    before = quantizer.codebook.detach().clone()
    latents = draw(7, 3).requires_grad_()
    quantized = quantizer(latents)
    # Three dead codes, seven latents: rows 0, 7 // 3 and 14 // 3.
    assert quantized.indices[[0, 2, 4]].tolist() == [1, 3, 4]
    torch.testing.assert_close(
        quantized.latents[[0, 2, 4]], quantizer.place(latents[[0, 2, 4]]).detach()
    )
    assert (quantizer.usage[dead] > config.revive_below).all()
    if not ema:
        assert torch.equal(quantizer.codebook[~dead], before[~dead])
        (quantized.codebook_loss + quantized.commitment_loss).backward()  # nothing changed in place


def test_a_collapsed_codebook_recovers():
    # Codes far away from all latents: one is nearest to all of them, until the others come back.
    torch.manual_seed(0)
    config = CodebookConfig(size=32, dim=4, ema=True, ema_decay=0.9, revive_below=0.2)
    quantizer = VectorQuantizer(config)
    quantizer.codebook.add_(50.0)
    quantizer.sums.copy_(quantizer.codebook * quantizer.usage[:, None])
    used = [len(quantizer(draw(64, 4, seed=i)).indices.unique()) for i in range(40)]
    assert used[0] < 4 and used[-1] > 22


def test_looking_up_changes_nothing():
    quantizer = make_quantizer(HEALTHY)
    quantizer(draw(64, 4))
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(draw(64, 4, seed=2), learn=False)
    quantizer.eval()(draw(64, 4, seed=3))
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_training_leaves_the_global_random_numbers_alone():
    quantizer = make_quantizer(HEALTHY)
    before = torch.get_rng_state()
    quantizer(draw(8, 4))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_restored_quantizer_goes_on_exactly(tmp_path: Path):
    quantizer = make_quantizer(HEALTHY)
    for step in range(3):
        quantizer(draw(64, 4, seed=step))
    torch.save(quantizer.state_dict(), tmp_path / "state.pt")
    restored = VectorQuantizer(HEALTHY)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(3, 6):
        latents = draw(64, 4, seed=step)
        assert torch.equal(quantizer(latents).indices, restored(latents).indices)
    assert torch.equal(quantizer.codebook, restored.codebook)


def learn_alone(config: CodebookConfig, batches: torch.Tensor) -> dict[str, torch.Tensor]:
    quantizer = make_quantizer(config)
    optimizer = torch.optim.SGD([*quantizer.parameters(), torch.nn.Parameter(torch.zeros(1))], 1.0)
    for latents in batches:
        optimizer.zero_grad()
        loss = quantizer(latents).codebook_loss
        if loss.requires_grad:
            loss.backward()
            if dist.is_initialized():  # what DistributedDataParallel does
                gradient = quantizer.get_parameter("codebook").grad
                assert gradient is not None
                dist.all_reduce(gradient)
                gradient /= dist.get_world_size()
        optimizer.step()
    return {name: value.detach() for name, value in quantizer.state_dict().items()}


def learn_on_rank(rank: int, folder: str, configs: list[CodebookConfig], batches: torch.Tensor):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    half = batches.shape[1] // 2
    own = batches[:, rank * half : (rank + 1) * half]
    torch.save([learn_alone(config, own) for config in configs], f"{folder}/{rank}.pt")
    dist.barrier()  # a process that leaves early can abort the other
    dist.destroy_process_group()


def test_two_processes_learn_the_codebook_of_one(tmp_path: Path):
    by_gradient = CodebookConfig(size=16, dim=4, ema_decay=0.8, revive_below=0.3)
    configs = [HEALTHY, by_gradient]
    batches = draw(6, 24, 4)
    on_two_ranks(learn_on_rank, str(tmp_path), configs, batches)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for config, *states in zip(configs, *halves, strict=True):
        alone = learn_alone(config, batches)
        for name, expected in alone.items():
            assert torch.equal(states[0][name], states[1][name]), name
            torch.testing.assert_close(states[0][name], expected, msg=name)
