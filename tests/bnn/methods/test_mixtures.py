"""Ensembles of posteriors: what their members do alone they do together, and a prediction's draws are shared out."""

import pytest
import torch
from bnn_cases import Rows, score, seeded
from safetensors.torch import load_file

from bnn.methods.base import Schedule, trainable
from bnn.methods.blob_ensemble import BLoBEnsemble
from bnn.methods.ensemble import Ensemble
from bnn.methods.sgp_ensemble import SGPEnsemble
from bnn.sampler import active_factors
from tests.conftest import perturb

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
ARGUMENTS = {
    SGPEnsemble: {
        "scale_lr_factor": 3.0,
        "flow_lr_factor": 0.5,
        "antithetic": True,
        "cuda_graph": False,
        "posterior": {"inducing_rows": 5, "inducing_cols": 5},
    },
    Ensemble: {},
    BLoBEnsemble: {"prior_sd": 0.2, "init_eps": 0.05, "kl_lr": 0.01, "gamma": None},
}
KINDS = [SGPEnsemble, BLoBEnsemble]
SCHEDULE = Schedule(total_steps=20, steps_per_epoch=10, n_train=80)
K = 3


def make(kind, members=K):
    return kind(members, **ARGUMENTS[kind])


def alone(kind):
    return kind.member(**ARGUMENTS[kind])


def adapted(method, llama):
    torch.manual_seed(0)
    return method.adapt(llama, LORA)


def own(model, name: str) -> dict[str, torch.Tensor]:
    """What belongs to an adapter, values copied, by names that do not have its own in them."""
    return {n.replace(f".{name}", ""): t.detach().clone() for n, t in model.state_dict().items() if f".{name}" in n}


def train(method, model, ids, steps: int = 6) -> list[list[float]]:
    """As the training script does, the draws of a step alike for every member; its losses."""
    optimizer = torch.optim.AdamW(method.parameter_groups(model, lr=0.02, weight_decay=0.0), foreach=False)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    method.start(model, SCHEDULE)
    model.train()
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        losses.append([])
        for _ in method.members(model):
            with method.sample(model, 1, seeded(step)) as live:
                loss = model(input_ids=ids, labels=ids).loss + 1e-4 * live.kl()
                loss.backward()
            losses[-1].append(loss.item())
        for part in method.clipped_together(model, parameters):
            torch.nn.utils.clip_grad_norm_(part, 0.5)
        optimizer.step()
        method.after_step(model, step, 1.0)
    return losses


def predict(method, model, ids, n):
    batches = [Rows(ids), Rows(ids[:1])]
    return method.predict(model.eval(), score, batches, n=n, generator=seeded(), max_tokens_per_forward=50)


@pytest.mark.parametrize("kind", KINDS)
def test_each_member_trains_as_it_would_alone(kind, make_llama, ids):
    method = make(kind)
    model = adapted(method, make_llama())
    starts = [own(model, name) for name in method.names]
    assert any(not torch.equal(starts[0][n], starts[1][n]) for n in starts[0])
    losses = train(method, model, ids)
    assert all(last < first for first, last in zip(losses[0], losses[-1], strict=True))
    for k, name in enumerate(method.names):
        single = alone(kind)
        other = adapted(single, make_llama())
        other.load_state_dict(renamed(starts[k], other), strict=False)
        expected = train(single, other, ids)
        assert [step[k] for step in losses] == pytest.approx([step[0] for step in expected], rel=1e-6)
        trained, reference = own(model, name), own(other, "default")
        assert trained.keys() == reference.keys()
        for n in reference:
            torch.testing.assert_close(trained[n], reference[n], rtol=1e-4, atol=1e-6)


def renamed(state: dict[str, torch.Tensor], model) -> dict[str, torch.Tensor]:
    """The same values under the names of a model whose adapter is the default one."""
    return {n: state[n.replace(".default", "")] for n in model.state_dict() if n.replace(".default", "") in state}


@pytest.mark.parametrize("kind", KINDS)
def test_the_draws_of_a_prediction_are_shared_out_equally(kind, make_llama, ids):
    method = make(kind)
    assert method.modes(10) == [12, "mean"]
    assert method.modes(12) == [12, "mean"]
    assert method.modes(1) == [K, "mean"]
    assert method.stochastic
    model = adapted(method, make_llama())
    perturb(model, 0.1)
    scores = predict(method, model, ids, 4)
    assert scores.shape[:2] == (2 * K, 4)
    means = predict(method, model, ids, None)
    assert means.shape[:2] == (K, 4)
    assert model.active_adapter == "member0"
    generator = seeded()
    for k, name in enumerate(method.names):
        model.set_adapter(name)
        given = {"generator": generator, "max_tokens_per_forward": 50}
        of_member = alone(kind).predict(model, score, [Rows(ids), Rows(ids[:1])], n=2, **given)
        assert torch.equal(scores[k::K], of_member)
        assert not torch.equal(of_member[0], of_member[1])
        torch.testing.assert_close(means[k, :3], score(model, Rows(ids)).detach().float())
    assert not torch.allclose(means[0], means[1], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_predicts_alike_and_so_does_each_member_alone(kind, make_llama, ids, tmp_path):
    method = make(kind)
    model = adapted(method, make_llama())
    train(method, model, ids)
    method.save(model, tmp_path)
    again = make(kind)
    loaded = again.load(make_llama(), tmp_path)
    assert {n for n, _ in trainable(loaded)} == {n for n, _ in trainable(model)}
    for n in (None, 6):
        torch.testing.assert_close(predict(again, loaded, ids, n), predict(method, model, ids, n))
    means = predict(method, model, ids, None)
    for k, name in enumerate(method.names):
        single = alone(kind)
        one = single.load(make_llama(), tmp_path / name)
        torch.testing.assert_close(predict(single, one, ids, None)[0], means[k])
    before = own(loaded, "member2")
    train(again, loaded, ids, steps=2)
    after = own(loaded, "member2")
    assert any(not torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_members_folder_has_what_its_method_saves_alone(kind, make_llama, tmp_path):
    method, single = make(kind), alone(kind)
    method.own["member1"].save(adapted(method, make_llama()), tmp_path / "of")
    single.save(adapted(single, make_llama()), tmp_path / "alone")
    assert [path.name for path in (tmp_path / "of").iterdir() if path.is_dir()] == ["member1"]
    for path in (tmp_path / "alone").glob("*.safetensors"):
        assert load_file(tmp_path / "of" / "member1" / path.name).keys() == load_file(path).keys() != set()


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_trained_once(kind, make_llama):
    method = make(kind)
    model = adapted(method, make_llama())
    groups = method.parameter_groups(model, lr=0.01, weight_decay=0.0)
    updated = [p for group in groups for p in group["params"]]
    assert len({id(p) for p in updated}) == len(updated)
    assert sum(p.numel() for p in updated) == sum(p.numel() for _, p in trainable(model))


def test_members_of_another_kind_are_refused(make_llama, tmp_path):
    for kind in KINDS:
        method = make(kind, 2)
        method.save(adapted(method, make_llama()), tmp_path / kind.__name__)
    with pytest.raises(ValueError, match="holds an adapter of type LORA, and this method takes SGP_LORA"):
        make(SGPEnsemble, 2).load(make_llama(), tmp_path / "BLoBEnsemble")
    (tmp_path / "SGPEnsemble" / "member1").rename(tmp_path / "other")
    (tmp_path / "BLoBEnsemble" / "member1").rename(tmp_path / "SGPEnsemble" / "member1")
    with pytest.raises(ValueError, match="member1 holds an adapter of type LORA, and this method takes SGP_LORA"):
        make(SGPEnsemble, 2).load(make_llama(), tmp_path / "SGPEnsemble")


@pytest.mark.parametrize(
    "option",
    [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["norm"]}, {"trainable_token_indices": [1, 2]}],
    ids=str,
)
@pytest.mark.parametrize("kind", [Ensemble, *KINDS])
def test_what_is_trained_beside_the_factors_is_each_members_own(kind, option, make_llama, ids, tmp_path):
    method = make(kind)
    torch.manual_seed(0)
    model = method.adapt(make_llama(), LORA | option)
    before = [own(model, name) for name in method.names]
    train(method, model, ids, steps=2)
    after = [own(model, name) for name in method.names]
    beside = [n for n in before[0] if "lora_" not in n]
    assert beside
    assert all(not torch.equal(before[k][n], after[k][n]) for k in range(K) for n in beside)
    assert all(not torch.equal(after[0][n], after[1][n]) for n in beside)
    method.save(model, tmp_path)
    again = make(kind)
    loaded = again.load(make_llama(), tmp_path)
    torch.testing.assert_close(predict(again, loaded, ids, None), predict(method, model, ids, None))


def test_the_sampler_of_every_member_draws_its_own_factors(make_llama):
    method = make(SGPEnsemble, 2)
    model = adapted(method, make_llama())
    method.parameter_groups(model, lr=0.01, weight_decay=0.0)
    held = []
    for _ in method.members(model):
        with method.sample(model, 1, seeded()):
            held.append([id(f) for f in active_factors(model) if f.has_sample])
    assert len(held[0]) == len(held[1]) > 0
    assert not set(held[0]) & set(held[1])
