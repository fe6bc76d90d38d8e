"""muon.py: TorchMuon against float64, and against Dion's Muon where that is installed."""

import copy
import math
import textwrap

import pytest
import torch

import train
from helpers import CPU, make_cfg, make_model, make_optimizers, one_process, random_grads, relative
from nanofp8.config import UserError
from nanofp8.muon import TorchMuon, dion_muon, import_bitsandbytes, make_muon, polar_express
from nanofp8.schedule import momentum_at

pytestmark = pytest.mark.usefixtures("fresh")


# -----------------------------------------------------------------------------------------------------
# Groups


@pytest.mark.parametrize("muon_impl", ["torch", "dion"])
def test_warm_up_changes_nothing_now_or_later(muon_impl):
    """The parameters stay equal now and after three updates, bit for bit."""
    if muon_impl == "dion":
        pytest.importorskip("dion")
    cfg = make_cfg(muon_impl=muon_impl, weight_decay=0.5, weight_decay_embed=0.5)
    models = [make_model(cfg), make_model(cfg)]
    start = copy.deepcopy(models[0].state_dict())
    optimizers = [make_optimizers(m, cfg) for m in models]
    parallel = [train.Parallel(m, "none", cfg, one_process()) for m in models]
    optimizers[0].warm_up(parallel[0])
    assert all(torch.equal(v, start[k]) for k, v in models[0].state_dict().items())
    assert all(p.grad is None for p in models[0].parameters())
    for step in range(3):
        for model, optimizer, wrapper in zip(models, optimizers, parallel, strict=True):
            optimizer.set_schedule(step)
            random_grads(model, step)
            optimizer.step()
            wrapper.buffers.zero_grad()
        for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert torch.equal(a, b), (step, name)
    assert not torch.equal(models[0].norm.weight, start["norm.weight"])


# -----------------------------------------------------------------------------------------------------
# TorchMuon

SHAPES = {"square": (64, 64), "tall": (128, 32), "wide": (32, 128)}


def matrix(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def muon_of(*weights, lr=0.1, weight_decay=0.0, mu=0.9, **group):
    """Parameters and a TorchMuon over them in one group."""
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    groups = [dict(params=params, lr=lr, weight_decay=weight_decay, mu=mu, **group)]
    return params, groups, TorchMuon(groups)


def polar(m):
    """The nearest orthogonal matrix, U V^T of the SVD, in float64: what Newton-Schulz converges to."""
    u, _, v = torch.linalg.svd(m.double(), full_matrices=False)
    return u @ v


def fan_scale(shape):
    return math.sqrt(shape[0] / shape[1])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_update_has_singular_values_of_sqrt_fan_out_over_fan_in(shape):
    """Within 3%: the iteration runs in bf16, where a singular value of 1 is good to a few times 2^-8.
    The gradient's singular values are spread over a factor of 50."""
    u, _, v = torch.linalg.svd(matrix(shape, 0), full_matrices=False)
    grad = u @ torch.diag(torch.logspace(0, -1.7, len(v))) @ v
    (p,), _, opt = muon_of(torch.zeros(shape), lr=1.0)
    p.grad = grad
    opt.step()
    values = torch.linalg.svdvals(p.detach())
    assert (values / fan_scale(shape) - 1).abs().max() < 0.03
    assert relative(-p, polar(grad) * fan_scale(shape)) < 0.03


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e5])
def test_an_update_does_not_depend_on_the_gradients_scale(scale):
    """1%: the iteration's first rounding to bf16 falls elsewhere."""
    updates = []
    for s in (1.0, scale):
        (p,), _, opt = muon_of(torch.zeros(64, 32), lr=1.0)
        p.grad = matrix((64, 32), 0) * s
        opt.step()
        updates.append(p.detach())
    assert relative(updates[1], updates[0]) < 1e-2


def reference_muon(weight, grads, momenta, lr, weight_decay, parts=1):
    """Float64: M = mu M + g; step along polar(g + mu M) of each part; decay by the base learning rate."""
    weight, M = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for g, mu in zip(grads, momenta, strict=True):
        M = mu * M + g.double()
        nesterov = g.double() + mu * M
        update = torch.cat([polar(part) * fan_scale(part.shape) for part in nesterov.chunk(parts)])
        weight = weight * (1 - lr * weight_decay) - lr * update
    return weight, M


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("momenta", [[0.9] * 6, [0.0, 0.5, 0.7, 0.9, 0.95, 0.95], [0.95, 0.9, 0.5, 0.5, 0.8, 0.0]],
                         ids=["constant", "rising", "falling"])
def test_momentum_and_nesterov_follow_dions_definition_while_the_momentum_changes(shape, momenta):
    """M = mu M + g to fp32 rounding (1e-5); the path of the weight to bf16 orthogonalisation (3% of its length)."""
    start, grads = matrix(shape, 99), [matrix(shape, i) for i in range(6)]
    (p,), groups, opt = muon_of(start, lr=0.1, weight_decay=0.5)
    for g, mu in zip(grads, momenta, strict=True):
        groups[0]["mu"] = mu
        p.grad = g.clone()
        opt.step()
    want, M = reference_muon(start, grads, momenta, 0.1, 0.5)
    assert relative(opt.momentum()[p], M) < 1e-5
    assert relative(p - start, want - start) < 0.03


def test_q_k_and_v_are_three_matrices():
    """Bit for bit what three separate parameters get; and not what one (192, 64) matrix gets. The parts' sizes differ
    by 100."""
    C = 64
    weight, sizes = matrix((3 * C, C), 7), torch.tensor([1.0, 100.0, 0.01]).repeat_interleave(C)[:, None]
    (fused,), _, opt = muon_of(weight, split_sizes=(C, C, C), weight_decay=0.1)
    apart, _, opt_apart = muon_of(*weight.chunk(3), weight_decay=0.1)
    (whole,), _, opt_whole = muon_of(weight, weight_decay=0.1)
    for step in range(3):
        grad = matrix((3 * C, C), step) * sizes
        fused.grad, whole.grad = grad.clone(), grad.clone()
        for p, g in zip(apart, grad.chunk(3), strict=True):
            p.grad = g.clone()
        for o in (opt, opt_apart, opt_whole):
            o.step()
    assert torch.equal(fused, torch.cat(apart))
    assert relative(whole - weight, fused - weight) > 0.2
    assert torch.equal(opt.momentum()[fused], torch.cat([opt_apart.momentum()[p] for p in apart]))


def test_uneven_parts():
    (p,), _, opt = muon_of(torch.zeros(96, 32), lr=1.0, split_sizes=(64, 16, 16))
    p.grad = matrix((96, 32), 0)
    opt.step()
    for part, rows in zip(p.detach().split((64, 16, 16)), (64, 16, 16), strict=True):
        assert (torch.linalg.svdvals(part) / fan_scale((rows, 32)) - 1).abs().max() < 0.05


def test_a_zero_gradient_gives_a_zero_update():
    """As for q and k while the output projection is zero: no NaN, and only the weight decay acts."""
    weight = matrix((192, 64), 0)
    (p,), _, opt = muon_of(weight, lr=0.5, weight_decay=0.0, split_sizes=(64, 64, 64))
    p.grad = torch.zeros_like(p)
    opt.step()
    assert torch.equal(p, weight)
    grad = matrix((192, 64), 1)
    grad[:128] = 0  # q and k only
    p.grad = grad
    opt.step()
    assert torch.equal(p[:128], weight[:128]) and not torch.equal(p[128:], weight[128:])


def test_a_parameter_without_a_gradient_stands_still():
    (a, b), _, opt = muon_of(matrix((32, 32), 0), matrix((32, 32), 1), weight_decay=0.5)
    before = b.detach().clone()
    a.grad = matrix((32, 32), 2)
    opt.step()
    assert torch.equal(b, before) and opt.momentum()[b].eq(0).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_weight_decay_goes_by_the_base_learning_rate(shape):
    """w * (1 - lr * decay), whatever the shape: fp32 rounding."""
    weight = matrix(shape, 0)
    (p,), _, opt = muon_of(weight, lr=0.25, weight_decay=0.4)
    p.grad = torch.zeros_like(p)
    opt.step()
    torch.testing.assert_close(p.detach(), weight * 0.9, rtol=1e-6, atol=0)


def test_momentum_converts_both_ways():
    """Exported as Dion keeps it (a sum) and loaded into a new optimizer, the updates continue alike, also at another
    momentum."""
    start = [matrix((192, 64), 50), matrix((32, 64), 51)]

    def make():
        params = [torch.nn.Parameter(w.clone()) for w in start]
        groups = [dict(params=params[:1], lr=0.1, weight_decay=0.1, mu=0.85, split_sizes=(64, 64, 64)),
                  dict(params=params[1:], lr=0.1, weight_decay=0.1, mu=0.85)]
        return params, groups, TorchMuon(groups)

    def step(params, groups, opt, i, mu):
        for g in groups:
            g["mu"] = mu
        for j, p in enumerate(params):
            p.grad = matrix(p.shape, 10 * i + j)
        opt.step()

    params, groups, opt = make()
    for i, mu in enumerate((0.85, 0.88, 0.91)):
        step(params, groups, opt, i, mu)
    kept = {j: opt.momentum()[p].clone() for j, p in enumerate(params)}
    for j, p in enumerate(params):
        want = reference_muon(start[j], [matrix(p.shape, 10 * i + j) for i in range(3)], (0.85, 0.88, 0.91), 0, 0)[1]
        assert relative(kept[j], want) < 1e-5

    params2, groups2, opt2 = make()
    opt2.load_momentum({p: kept[j] for j, p in enumerate(params2)})
    for j, p in enumerate(params2):
        assert relative(opt2.momentum()[p], kept[j]) < 1e-6
        with torch.no_grad():
            p.copy_(params[j])
    for i, mu in enumerate((0.94, 0.95), start=3):
        step(params, groups, opt, i, mu)
        step(params2, groups2, opt2, i, mu)
    for p, q in zip(params, params2, strict=True):
        assert relative(opt2.momentum()[q], opt.momentum()[p]) < 1e-5
        assert relative(q, p) < 1e-3  # the buffers differ by fp32 rounding, their orthogonalised sums by bf16's


def test_momentum_of_a_fresh_optimizer_is_zero():
    (p,), _, opt = muon_of(matrix((64, 64), 0))
    assert opt.momentum()[p].eq(0).all() and opt.momentum()[p].shape == p.shape


def test_one_step_of_the_model_against_the_reference():
    """Through Optimizers: groups, schedule and momentum together, for every matrix of the blocks."""
    cfg = make_cfg(learning_rate=0.1, weight_decay=0.3, weight_decay_end=1.0, USE_CAUTIOUS_WD=False, warmup_iters=4,
                   muon_momentum_iters=4, muon_variant="muon")
    model = make_model(cfg)
    optimizers = make_optimizers(model, cfg)
    start = {n: p.detach().clone() for n, p in model.blocks.named_parameters()}
    grads = []
    optimizers.set_schedule(1)
    random_grads(model, 5)
    grads = {n: p.grad.clone() for n, p in model.blocks.named_parameters()}
    optimizers.step()
    for name, p in model.blocks.named_parameters():
        if p.ndim == 2:
            parts = 3 if name.endswith("qkv.weight") else 1
            momentum = momentum_at(1, cfg.muon_momentum_start, cfg.muon_momentum, 4)
            want, _ = reference_muon(start[name], [grads[name]], [momentum], 0.1 * 0.5, 0.3, parts)
            # Random square matrices have singular values down to 1/64 of the mean, which converge last
            assert relative(p - start[name], want - start[name]) < 0.1, name


@pytest.mark.parametrize("shape", sorted(SHAPES.values()))
def test_cautious_decay_where_update_and_weight_agree(shape):
    """arXiv 2510.12402: the weight is decayed only where the update moves it towards zero, from its old value."""
    start, grad, (lr, decay) = matrix(shape, 0), matrix(shape, 1), (0.1, 0.5)
    moved = {}
    for cautious in (None, False, True):
        used = 0.0 if cautious is None else decay
        (p,), _, opt = muon_of(start, lr=lr, weight_decay=used, cautious_wd=bool(cautious))
        p.grad = grad.clone()
        opt.step()
        moved[cautious] = p.detach().clone()
    towards_zero = start * (start - moved[None]) >= 0
    assert 0.2 < towards_zero.float().mean() < 0.8
    assert torch.allclose(moved[True], torch.where(towards_zero, moved[False], moved[None]), atol=1e-6)


@pytest.mark.parametrize("parts", [1, 3])
def test_normuon_divides_rows_by_their_averaged_size_and_keeps_the_norm(parts):
    """Against the formulas in fp32, with Muon's own update as their input (TorchMuon without muon_beta2)."""
    sizes = dict(split_sizes=(32,) * parts) if parts > 1 else {}
    start = matrix((32 * parts, 64), 9)
    (plain_p,), _, plain_opt = muon_of(start, lr=0.1, **sizes)
    (p,), _, opt = muon_of(start, lr=0.1, muon_beta2=0.8, **sizes)
    whole_scale, variance, want = fan_scale(start.shape), torch.zeros(32 * parts, 1), start.clone()
    for step in range(3):
        before = plain_p.detach().clone()
        for q, o in ((plain_p, plain_opt), (p, opt)):
            q.grad = matrix(start.shape, step)
            o.step()
        update = (before - plain_p.detach()) / 0.1
        variance = 0.8 * variance + 0.2 * (update / whole_scale).square().mean(1, keepdim=True)
        for piece, v, w in zip(update.chunk(parts), variance.chunk(parts), want.chunk(parts), strict=True):
            rows = piece / v.sqrt()
            w -= 0.1 * rows * piece.norm() / rows.norm()
        assert relative(p, want) < 1e-5
        assert relative(opt.variances[p], variance) < 1e-4


@pytest.mark.parametrize("choice", ["auto", "dion"])
def test_parameters_that_dion_cannot_divide(choice):
    """FSDP2 over 5 ranks: TorchMuon by default, one line if Dion was asked for."""
    groups = [dict(params=[torch.nn.Parameter(torch.zeros(6, 2))], lr=0.1, weight_decay=0.0, mu=0.9)]
    why = "Dion cannot divide 384 rows among 5 ranks"
    if choice == "auto":
        muon, description = make_muon(groups, choice, CPU, None, False, why)
        assert isinstance(muon, TorchMuon) and why in description
    else:
        with pytest.raises(UserError, match=f"{why}.*--muon_impl=auto"):
            make_muon(groups, choice, CPU, None, False, why)


# -----------------------------------------------------------------------------------------------------
# Against Dion


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 256, 64), (2, 64, 256), (256, 64)])
def test_polar_express_against_dions(shape):
    """Compared with the same polynomials in float64, ours is about as close as Dion's compiled function, and not
    further than Dion's uncompiled one (on a CPU, where a batch of one takes another matmul)."""
    pytest.importorskip("dion")
    from dion import polar_express as dions
    G = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    X = G.double() / (G.double().norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    X = X.mT if shape[-2] > shape[-1] else X
    for a, b, c in dions._POLAR_EXPRESS_COEFFS:
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    exact = X.mT if shape[-2] > shape[-1] else X
    ours = polar_express(G)
    assert ours.dtype == torch.bfloat16 and ours.shape == G.shape and relative(ours, exact) < 0.04
    for stance, allowed in (("force_eager", 1.1), ("default", 1.5)):
        with torch.compiler.set_stance(stance):
            assert relative(ours, exact) < allowed * relative(dions.polar_express(G), exact), stance


@pytest.mark.parametrize("cautious, variant", [(False, "muon"), (True, "muon"), (True, "normuon")])
def test_torch_muon_against_dions(cautious, variant):
    """One step, and five with a changing momentum and learning rate, through Optimizers in both implementations.

    Dion's Polar Express stops after five bf16 steps with singular values between 0.86 and 1.14; TorchMuon's lie within
    0.01 of 1. So updates of random gradients differ by about 10% of their norm, all of it in the singular values:
    brought to 1, a first update differs by bf16 rounding, 2%. Momenta differ by fp32 rounding, AdamW's parameters not
    at all.
    """
    pytest.importorskip("dion")
    changes = dict(learning_rate=0.1, weight_decay=0.3, warmup_iters=3, max_iters=8, muon_momentum_iters=4,
                   USE_CAUTIOUS_WD=cautious, weight_decay_end=0.5, muon_variant=variant)
    runs, variances = {}, {}
    for impl in ("torch", "dion"):
        cfg = make_cfg(muon_impl=impl, **changes)
        model = make_model(cfg)
        optimizers = make_optimizers(model, cfg)
        assert ("Dion" in optimizers.description.split(";")[0]) == (impl == "dion")
        path = [{n: p.detach().clone() for n, p in model.named_parameters()}]
        for step in range(5):
            optimizers.set_schedule(step)
            random_grads(model, 50 + step)  # not 0: a singular value of 1e-5 has no sign that rounding would leave it
            optimizers.step()
            path.append({n: p.detach().clone() for n, p in model.named_parameters()})
        muon = optimizers.muon
        momentum = muon.momentum() if impl == "torch" else {p: s["momentum"] for p, s in muon.state.items()}
        if variant == "normuon":
            variances[impl] = {p.shape: optimizers.state_of(muon)[p]["variance_neuron"] for p in momentum}
        runs[impl] = path, {n: momentum[p] for n, p in model.named_parameters() if p in momentum}
    (path, momenta), (dion_path, dion_momenta) = runs["torch"], runs["dion"]
    assert momenta.keys() == dion_momenta.keys() and len(momenta) == 8
    for shape, variance in variances.get("torch", {}).items():
        assert relative(variance, variances["dion"][shape]) < 0.25, shape
    for name, start in path[0].items():
        if name not in momenta:
            assert torch.equal(path[5][name], dion_path[5][name]), name
            continue
        for step in (1, 5):
            assert relative(path[step][name] - start, dion_path[step][name] - start) < 0.13, (name, step)
        if cautious:
            continue  # which elements were decayed depends on the update's signs, and so on its rounding
        decayed = start * (1 - 0.1 / 3 * 0.3)
        for part, dion_part in zip(*((x[1][name] - decayed).chunk(3 if "qkv" in name else 1)
                                     for x in (path, dion_path)), strict=True):
            assert relative(polar(part), polar(dion_part)) < 0.02, name
            assert dion_part.norm() == pytest.approx(part.norm().item(), rel=0.05)
        assert relative(momenta[name], dion_momenta[name]) < 1e-5


def test_the_choice_of_muon(monkeypatch):
    """Dion if it can run, else torch's with a reason. muon_impl=dion without Dion is an error."""
    import shutil
    import sys
    from types import ModuleType
    stub = ModuleType("dion")
    stub.Muon = object()
    monkeypatch.delenv("CXX", raising=False)

    monkeypatch.setitem(sys.modules, "dion", stub)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)
    assert dion_muon("auto", CPU) == (stub.Muon, "") == dion_muon("dion", CPU)
    assert dion_muon("torch", CPU)[0] is None

    monkeypatch.setattr(shutil, "which", lambda name: None)
    muon, why = dion_muon("auto", CPU)
    assert muon is None and "compiler" in why
    with pytest.raises(UserError, match="compiler"):
        dion_muon("dion", CPU)
    assert dion_muon("auto", torch.device("cuda"))[0] is stub.Muon  # Triton needs no C++ compiler of ours
    assert dion_muon("auto", CPU, compiled=False)[0] is stub.Muon  # and what is not compiled needs none
    monkeypatch.setenv("CXX", "/opt/clang")
    monkeypatch.setattr(shutil, "which", lambda name: name if name == "/opt/clang" else None)
    assert dion_muon("auto", CPU)[0] is stub.Muon

    class Broken:  # a library that is missing on this machine, say
        def find_spec(self, name, *_):
            if name == "dion":
                raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "dion")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    muon, why = dion_muon("auto", CPU)
    assert muon is None and "libcudart.so.13" in why
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[1:])

    monkeypatch.setitem(sys.modules, "dion", None)
    muon, why = dion_muon("auto", CPU)
    assert muon is None and "dion" in why.lower()
    with pytest.raises(UserError, match="requirements.txt"):
        dion_muon("dion", CPU)
    optimizers = make_optimizers(make_model(), muon_impl="auto")
    assert isinstance(optimizers.muon, TorchMuon)
    assert "in plain PyTorch" in optimizers.description and why in optimizers.description


def test_dion_is_imported_without_compiling(tmp_path, monkeypatch):
    """torch.compile takes 2 s to import Inductor: not compiled, Dion's functions ask for it when they are first called.
    To be compiled, they ask at once, as they are written."""
    import sys
    (tmp_path / "dion.py").write_text(textwrap.dedent("""
        import torch

        class Muon:
            pass

        @torch.compile(fullgraph=True)
        def double(x):
            "Twice x."
            return 2 * x

        @torch.compile
        def half(x):
            return x / 2
    """))
    seen = []
    monkeypatch.setattr(torch, "compile", lambda f=None, **options: (
        lambda g: torch.compile(g, **options)) if f is None else seen.append((f.__name__, options)) or f)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "dion", None)  # to be put back, or removed, at the end
    del sys.modules["dion"]
    replaced = torch.compile
    assert dion_muon("auto", CPU, compiled=False)[1] == "" and not seen and torch.compile is replaced
    dion = sys.modules["dion"]
    assert dion.double(3) == dion.double(x=3) == 6 and dion.half(3) == 1.5 and dion.double.__doc__ == "Twice x."
    assert seen == [("double", dict(fullgraph=True)), ("half", {})]
    del sys.modules["dion"]
    monkeypatch.setenv("CXX", sys.executable)
    assert dion_muon("auto", CPU, compiled=True)[1] == "" and len(seen) == 4


def test_8_bit_adam_is_refused_where_it_cannot_run():
    for sharded, word in ((False, "GPU"), (True, "sharded")):
        with pytest.raises(UserError, match=word) as caught:
            import_bitsandbytes(one_process().device, sharded)
        assert caught.value.status == 2
